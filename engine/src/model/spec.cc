// config.json to ModelSpec: strict reading, then the rules that tie values together. Pure
// functions; any thread.
#include "src/model/spec.h"

#include <algorithm>
#include <new>
#include <set>
#include <string>
#include <string_view>

#include "src/core/printable.h"
#include "src/model/directory.h"
#include "src/model/json_reader.h"
#include "src/model/kv_format.h"
#include "src/model/slots.h"

namespace fq::model {
namespace {

using nlohmann::json;

constexpr int64_t kVersion = 1;
constexpr int64_t kMaxHidden = 65536;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxVocab = 1 << 22;
constexpr int64_t kMaxContext = 1 << 24;
constexpr int64_t kMaxMlpHidden = 1 << 20;
constexpr int64_t kMaxAttentionWidth = 1 << 20;  // heads * head_dim
constexpr int64_t kMaxImageSize = 1 << 14;
constexpr int64_t kMaxPatch = 1024;
constexpr int64_t kMaxChannels = 16;
constexpr size_t kMaxText = 4096;
constexpr size_t kMaxFiles = 10000;
constexpr size_t kMaxEndTokens = 1024;
constexpr JsonLimits kConfigLimits = {.depth = 16, .values = 1 << 21};

int read_int(ObjectReader& reader, std::string_view key, int64_t low, int64_t high) {
  return static_cast<int>(reader.integer(key, low, high));
}

float read_float(ObjectReader& reader, std::string_view key, double low, double high) {
  return static_cast<float>(reader.number(key, low, high));
}

NormSpec read_norm(ObjectReader reader) {
  NormSpec norm;
  norm.kind =
      reader.choice<NormKind>("kind", {{"rms", NormKind::kRms}, {"layer", NormKind::kLayer}});
  norm.eps = read_float(reader, "eps", 1e-12, 1.0);
  reader.finish();
  return norm;
}

Activation read_activation(ObjectReader& reader) {
  return reader.choice<Activation>("activation", {{"relu", Activation::kRelu},
                                                  {"gelu", Activation::kGelu},
                                                  {"gelu_tanh", Activation::kGeluTanh},
                                                  {"silu", Activation::kSilu}});
}

AttentionSpec read_attention(ObjectReader reader) {
  AttentionSpec attention;
  attention.heads = read_int(reader, "heads", 1, kMaxHidden);
  attention.kv_heads = read_int(reader, "kv_heads", 1, kMaxHidden);
  attention.head_dim = read_int(reader, "head_dim", 1, kMaxHidden);
  attention.qkv_bias = reader.boolean("qkv_bias");
  attention.output_bias = reader.boolean("output_bias");
  attention.scale = read_float(reader, "scale", 1e-9, 1e9);
  reader.finish();
  if (attention.heads % attention.kv_heads != 0) {
    reader.errors().add(reader.path_of("kv_heads"), std::to_string(attention.kv_heads) +
                                                        " does not divide heads, " +
                                                        std::to_string(attention.heads));
  }
  if (int64_t{attention.heads} * attention.head_dim > kMaxAttentionWidth) {
    reader.errors().add(reader.path_of("head_dim"),
                        "heads * head_dim is more than " + std::to_string(kMaxAttentionWidth));
  }
  return attention;
}

MlpSpec read_mlp(ObjectReader reader) {
  MlpSpec mlp;
  mlp.kind =
      reader.choice<MlpKind>("kind", {{"plain", MlpKind::kPlain}, {"gated", MlpKind::kGated}});
  mlp.activation = read_activation(reader);
  mlp.hidden = read_int(reader, "hidden", 1, kMaxMlpHidden);
  mlp.bias = reader.boolean("bias");
  reader.finish();
  return mlp;
}

RopeSpec read_rope(ObjectReader reader, int head_dim) {
  RopeSpec rope;
  rope.base = reader.number("base", 1.0, 1e12);
  rope.dims = read_int(reader, "dims", 2, kMaxHidden);
  ObjectReader scaling = reader.object("scaling");
  rope.scaling = scaling.choice<RopeScaling>("kind", {{"none", RopeScaling::kNone},
                                                      {"linear", RopeScaling::kLinear},
                                                      {"llama3", RopeScaling::kLlama3}});
  if (rope.scaling != RopeScaling::kNone) rope.factor = scaling.number("factor", 1e-3, 1e6);
  if (rope.scaling == RopeScaling::kLlama3) {
    rope.low_freq_factor = scaling.number("low_freq_factor", 1e-6, 1e6);
    rope.high_freq_factor = scaling.number("high_freq_factor", 1e-6, 1e6);
    rope.original_context = read_int(scaling, "original_context", 1, kMaxContext);
  }
  scaling.finish();
  reader.finish();
  if (rope.dims % 2 != 0 || rope.dims > head_dim) {
    reader.errors().add(reader.path_of("dims"), "expected an even number up to head_dim, " +
                                                    std::to_string(head_dim) + ", got " +
                                                    std::to_string(rope.dims));
  }
  if (rope.scaling == RopeScaling::kLlama3 && rope.high_freq_factor <= rope.low_freq_factor) {
    reader.errors().add(scaling.path_of("high_freq_factor"), "must be more than low_freq_factor");
  }
  return rope;
}

DecoderSpec read_decoder(ObjectReader reader) {
  DecoderSpec decoder;
  decoder.hidden = read_int(reader, "hidden", 1, kMaxHidden);
  decoder.layers = read_int(reader, "layers", 1, kMaxLayers);
  decoder.vocab = read_int(reader, "vocab", 1, kMaxVocab);
  decoder.context = read_int(reader, "context", 1, kMaxContext);
  decoder.tied_embedding = reader.boolean("tied_embedding");
  decoder.embedding_scale = read_float(reader, "embedding_scale", 1e-9, 1e9);
  decoder.norm = read_norm(reader.object("norm"));
  decoder.attention = read_attention(reader.object("attention"));
  decoder.rope = read_rope(reader.object("rope"), decoder.attention.head_dim);
  decoder.mlp = read_mlp(reader.object("mlp"));
  reader.finish();
  return decoder;
}

ActivationFormat read_activations(ObjectReader& reader) {
  ActivationFormat format;
  format.bits = read_int(reader, "bits", 4, 8);
  format.symmetric = reader.boolean("symmetric");
  if (format.bits != 4 && format.bits != 6 && format.bits != 8) {
    reader.errors().add(reader.path_of("bits"),
                        "expected 4, 6 or 8, got " + std::to_string(format.bits));
  }
  reader.finish();
  return format;
}

VisionSpec read_vision(ObjectReader reader) {
  VisionSpec vision;
  vision.image_size = read_int(reader, "image_size", 1, kMaxImageSize);
  vision.patch = read_int(reader, "patch", 1, kMaxPatch);
  vision.channels = read_int(reader, "channels", 1, kMaxChannels);
  vision.hidden = read_int(reader, "hidden", 1, kMaxHidden);
  vision.layers = read_int(reader, "layers", 1, kMaxLayers);
  vision.patch_bias = reader.boolean("patch_bias");
  vision.post_norm = reader.boolean("post_norm");
  vision.norm = read_norm(reader.object("norm"));
  vision.attention = read_attention(reader.object("attention"));
  if (reader.has("attention_activations")) {
    ObjectReader fields = reader.object("attention_activations");
    vision.attention_activations = read_activations(fields);
    if (!is_attention_activations(vision.attention_activations)) {
      reader.errors().add(reader.path_of("attention_activations"),
                          "expected a8, got " + vision.attention_activations.name());
    }
  }
  vision.mlp = read_mlp(reader.object("mlp"));
  reader.finish();
  // Pixels beyond the last whole patch are left out, as a convolution without padding does.
  if (vision.patch > vision.image_size) {
    reader.errors().add(reader.path_of("patch"), std::to_string(vision.patch) +
                                                     " is larger than image_size, " +
                                                     std::to_string(vision.image_size));
  }
  if (vision.mlp.kind != MlpKind::kPlain) {
    reader.errors().add(reader.path_of("mlp.kind"), "expected \"plain\", got \"gated\"");
  }
  return vision;
}

ProjectorSpec read_projector(ObjectReader reader) {
  ProjectorSpec projector;
  reader.choice<int>("kind", {{"mlp", 0}});
  projector.input = read_int(reader, "input", 1, kMaxHidden);
  projector.hidden = read_int(reader, "hidden", 1, kMaxMlpHidden);
  projector.output = read_int(reader, "output", 1, kMaxHidden);
  projector.activation = read_activation(reader);
  reader.finish();
  return projector;
}

VisualSpec read_visual(ObjectReader reader) {
  VisualSpec visual;
  visual.pool = reader.choice<PoolMode>("pool", {{"none", PoolMode::kNone},
                                                 {"bilinear", PoolMode::kBilinear},
                                                 {"average", PoolMode::kAverage},
                                                 {"max", PoolMode::kMax}});
  visual.pool_stride = read_int(reader, "pool_stride", 1, kMaxImageSize);
  visual.newline = reader.choice<NewlineMode>("newline", {{"none", NewlineMode::kNone},
                                                          {"grid", NewlineMode::kGrid},
                                                          {"frame", NewlineMode::kFrame},
                                                          {"one_token", NewlineMode::kOneToken}});
  visual.image_newline = reader.boolean("image_newline");
  visual.image_max_tiles = read_int(reader, "image_max_tiles", 0, 1 << 16);
  reader.finish();
  return visual;
}

TokenSpec read_tokens(ObjectReader reader, int vocab) {
  TokenSpec tokens;
  if (!reader.null("bos")) tokens.bos = read_int(reader, "bos", 0, vocab - 1);
  tokens.add_bos = reader.boolean("add_bos");
  for (const json& id : reader.array("eos", kMaxEndTokens)) {
    const bool valid = id.is_number_unsigned() && id.get<uint64_t>() < static_cast<uint64_t>(vocab);
    if (!valid) {
      reader.errors().add(
          reader.path_of("eos"),
          "expected token ids in [0, " + std::to_string(vocab - 1) + "], got " + describe(id));
      break;
    }
    tokens.eos.push_back(id.get<TokenId>());
  }
  tokens.media = reader.text("media", kMaxText);
  ObjectReader tokenizer = reader.object("tokenizer");
  tokens.tokenizer =
      tokenizer.choice<TokenizerKind>("kind", {{"huggingface", TokenizerKind::kHuggingFace},
                                               {"sentencepiece", TokenizerKind::kSentencePiece}});
  tokens.tokenizer_file = tokenizer.text("file", kMaxText);
  tokenizer.finish();
  reader.finish();
  if (tokens.add_bos && !tokens.bos) {
    reader.errors().add(reader.path_of("add_bos"), "true, but bos is null");
  }
  return tokens;
}

DefaultsSpec read_defaults(ObjectReader reader) {
  DefaultsSpec defaults;
  defaults.kv = reader.text("kv", kMaxText);
  if (const auto kv = parse_kv_format(defaults.kv); !kv)
    reader.errors().add(reader.path_of("kv"), kv.error().message + "; " + kv.error().hint);
  if (!reader.null("similarity_lower_bound")) {
    defaults.similarity_lower_bound = reader.number("similarity_lower_bound", -1.0, 1.0);
  }
  reader.finish();
  return defaults;
}

WeightFormat read_format(ObjectReader reader) {
  using Kind = WeightFormat::Kind;
  WeightFormat format;
  format.kind = reader.choice<Kind>(
      "kind", {{"f32", Kind::kF32}, {"bf16", Kind::kBF16}, {"affine", Kind::kAffine}});
  if (format.kind == Kind::kAffine) {
    format.bits = read_int(reader, "bits", 2, 8);
    format.group = read_int(reader, "group", 0, 128);
    format.symmetric = reader.boolean("symmetric");
    format.scale = reader.choice<DType>(
        "scale", {{"f16", DType::kF16}, {"f32", DType::kF32}, {"i8", DType::kI8}});
    format.offset = reader.has("offset") && reader.boolean("offset");
    if (!is_affine_bits(format.bits)) {
      reader.errors().add(reader.path_of("bits"),
                          "expected 2, 3, 4, 5, 6 or 8, got " + std::to_string(format.bits));
    }
    if (!is_affine_group(format.group)) {
      reader.errors().add(reader.path_of("group"),
                          "expected 0, 16, 32, 64 or 128, got " + std::to_string(format.group));
    }
    if (format.offset && format.symmetric) {
      reader.errors().add(reader.path_of("offset"), "true, but the format is symmetric");
    }
    if (format.stepped() && format.group == 0) {
      reader.errors().add(reader.path_of("scale"), "i8, but a group is a whole row");
    }
  }
  reader.finish();
  return format;
}

ActivationFormat read_linear_activations(ObjectReader reader, const WeightFormat& weights) {
  if (reader.has("kind")) {
    ActivationFormat format;
    format.bf16 = reader.choice<bool>("kind", {{"bf16", true}});
    if (!format.fits(weights)) {
      reader.errors().add(reader.path_of("kind"),
                          "inputs are rounded for bf16 and affine weights only");
    }
    reader.finish();
    return format;
  }
  const ActivationFormat format = read_activations(reader);
  if (!format.fits(weights)) {
    reader.errors().add(reader.path_of("bits"),
                        "activations are quantized for affine weights only");
  }
  return format;
}

// The table must name exactly the linears that the rest of the description implies, with their
// sizes.
void read_linears(ObjectReader reader, ModelSpec& spec) {
  const json& table = reader.all();
  if (reader.errors().any()) return;  // slots() needs a valid description
  size_t matched = 0;
  for (const SlotInfo& slot : slots(spec)) {
    if (!slot.linear) continue;
    const auto entry = table.find(slot.name);
    if (entry == table.end()) {
      reader.errors().add(reader.path_of(slot.name), "missing");
      return;
    }
    ObjectReader fields(*entry, reader.path_of(slot.name), reader.errors());
    LinearSpec linear;
    linear.out = read_int(fields, "out", slot.out, slot.out);
    linear.in = read_int(fields, "in", slot.in, slot.in);
    linear.format = read_format(fields.object("format"));
    if (fields.has("activations")) {
      linear.activations = read_linear_activations(fields.object("activations"), linear.format);
    }
    fields.finish();
    if (reader.errors().any()) return;
    spec.linears.emplace(slot.name, linear);
    ++matched;
  }
  if (matched == table.size()) return;
  for (const auto& item : table.items()) {
    if (!spec.linears.contains(item.key())) {
      reader.errors().add("linears", "no slot is named " + printable(item.key()));
      return;
    }
  }
}

// Names are joined to the directory's path, so they must stay inside it.
bool is_plain_file_name(std::string_view name) {
  if (name.empty() || name.size() > 255 || name == "." || name == "..") return false;
  return std::none_of(name.begin(), name.end(), [](char c) {
    return c == '/' || c == '\\' || static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
}

bool is_sha256(std::string_view text) {
  return text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

void read_files(ObjectReader& root, ModelSpec& spec) {
  const json& list = root.array("files", kMaxFiles);
  std::set<std::string> names;
  for (size_t i = 0; i < list.size() && !root.errors().any(); ++i) {
    ObjectReader reader(list[i], root.path_of("files[" + std::to_string(i) + "]"), root.errors());
    FileSpec file;
    file.name = reader.text("name", kMaxText);
    file.bytes = static_cast<uint64_t>(reader.integer("bytes", 0, INT64_MAX));
    file.sha256 = reader.text("sha256", kMaxText);
    reader.finish();
    if (!is_plain_file_name(file.name) || file.name == "config.json") {
      reader.errors().add(reader.path_of("name"),
                          "expected a file of this directory other than "
                          "config.json, got " +
                              printable(file.name));
    }
    if (!is_sha256(file.sha256)) {
      reader.errors().add(reader.path_of("sha256"),
                          "expected 64 lower-case hex digits, got " + printable(file.sha256));
    }
    if (!names.insert(file.name).second) {
      reader.errors().add(reader.path_of("name"), printable(file.name) + " is listed twice");
    }
    spec.files.push_back(std::move(file));
  }
  if (!names.contains(spec.tokens.tokenizer_file)) {
    root.errors().add("tokens.tokenizer.file",
                      printable(spec.tokens.tokenizer_file) + " is not listed in files");
  }
}

void read_source(ObjectReader reader, ModelSpec& spec) {
  const json& source = reader.all();
  for (const auto& item : source.items()) {
    spec.source.emplace(item.key(), reader.text(item.key(), kMaxText));
  }
}

// Rules between the parts that turn pictures into rows of the prompt.
void check_vision(const ModelSpec& spec, ReadErrors& errors) {
  if (spec.vision.has_value() != spec.projector.has_value() ||
      spec.vision.has_value() != spec.visual.has_value()) {
    errors.add("", "vision, projector and visual must be all null or all present");
    return;
  }
  if (spec.vision.has_value() == spec.tokens.media.empty()) {
    errors.add("tokens.media", spec.vision ? "must not be empty: the model has vision"
                                           : "must be empty: the model has no vision");
  }
  if (!spec.vision) return;
  const auto must_equal = [&errors](std::string_view path, int got, int expected) {
    if (got == expected) return;
    errors.add(path, "expected " + std::to_string(expected) + ", got " + std::to_string(got));
  };
  must_equal("projector.input", spec.projector->input, spec.vision->hidden);
  must_equal("projector.output", spec.projector->output, spec.decoder.hidden);
  const int grid = spec.vision->grid();
  if (spec.visual->pool != PoolMode::kNone && spec.visual->pool_stride > grid) {
    errors.add("visual.pool_stride", "expected at most the patch grid's side, " +
                                         std::to_string(grid) + ", got " +
                                         std::to_string(spec.visual->pool_stride));
  }
}

Result<ModelSpec> read_spec(const json& document, std::string_view where) {
  ReadErrors errors(where);
  ObjectReader root(document, "", errors);
  // Format and version first: another version may well have other keys.
  root.choice<int>("format", {{"framequilt-model", 0}});
  const int64_t version = root.integer("version", 0, INT64_MAX);
  if (errors.any()) return errors.first();
  if (version != kVersion) {
    return Error{Code::kVersionMismatch,
                 std::string(where) + ": model format version " + std::to_string(version) +
                     ", but this Framequilt reads version " + std::to_string(kVersion),
                 "convert the model again with this version, or install the one that wrote it"};
  }
  ModelSpec spec;
  spec.version = static_cast<int>(version);
  spec.name = root.text("name", kMaxText);
  read_source(root.object("source"), spec);
  spec.weights = root.text("weights", kMaxText);
  spec.decoder = read_decoder(root.object("decoder"));
  if (!root.null("vision")) spec.vision = read_vision(root.object("vision"));
  if (!root.null("projector")) spec.projector = read_projector(root.object("projector"));
  if (!root.null("visual")) spec.visual = read_visual(root.object("visual"));
  spec.tokens = read_tokens(root.object("tokens"), spec.decoder.vocab);
  spec.defaults = read_defaults(root.object("defaults"));
  read_files(root, spec);
  check_vision(spec, errors);
  read_linears(root.object("linears"), spec);
  root.finish();
  if (errors.any()) return errors.first();
  return spec;
}

}  // namespace

Result<ModelSpec> parse_spec(std::string_view text, std::string_view where) {
  try {
    FQ_ASSIGN_OR_RETURN(const json document, parse_json_object(text, where, kConfigLimits));
    return read_spec(document, where);
  } catch (const std::bad_alloc&) {
    return Error{Code::kOutOfMemory, std::string(where) + ": not enough memory to read it", ""};
  }
}

std::string WeightFormat::name() const {
  switch (kind) {
    case Kind::kF32:
      return "f32";
    case Kind::kBF16:
      return "bf16";
    case Kind::kAffine:
      break;
  }
  std::string text = "w" + std::to_string(bits);
  text += group == 0 ? "row" : "g" + std::to_string(group);
  if (symmetric) text += "-sym";
  if (offset) text += "-offset";
  if (scale == DType::kF32) text += "-f32scale";
  if (scale == DType::kI8) text += "-i8scale";
  return text;
}

bool is_affine_bits(int bits) { return (bits >= 2 && bits <= 6) || bits == 8; }

bool is_affine_group(int group) {
  return group == 0 || group == 16 || group == 32 || group == 64 || group == 128;
}

bool is_affine_format(const WeightFormat& format) {
  const bool number = format.scale == DType::kF16 || format.scale == DType::kF32;
  return is_affine_bits(format.bits) && is_affine_group(format.group) &&
         (number || (format.stepped() && format.group != 0)) &&
         !(format.offset && format.symmetric);
}

bool ActivationFormat::fits(const WeightFormat& weights) const {
  if (quantized()) return weights.kind == WeightFormat::Kind::kAffine;
  return !bf16 || weights.kind != WeightFormat::Kind::kF32;
}

std::string ActivationFormat::name() const {
  if (bf16) return "abf16";
  return "a" + std::to_string(bits) + (quantized() && !symmetric ? "-asym" : "");
}

std::optional<ActivationFormat> parse_activation_format(std::string_view name) {
  if (name == "abf16") return ActivationFormat{.bf16 = true};
  for (const int bits : {16, 8, 6, 4}) {
    for (const bool symmetric : {true, false}) {
      const ActivationFormat format{bits, symmetric};
      if (format.name() == name) return format;
    }
  }
  return std::nullopt;
}

bool is_attention_activations(const ActivationFormat& format) {
  return format.float32() || format == ActivationFormat{.bits = 8};
}

std::optional<ActivationChoice> parse_activation_choice(std::string_view text) {
  const std::string_view all = text.substr(0, text.find(','));
  const auto linears = parse_activation_format(all);
  if (!linears) return std::nullopt;
  ActivationChoice choice{*linears, {}, {}};
  for (text.remove_prefix(all.size()); !text.empty();) {
    text.remove_prefix(1);  // the comma
    const std::string_view word = text.substr(0, text.find(','));
    text.remove_prefix(word.size());
    const size_t equals = word.find('=');
    if (equals == std::string_view::npos) return std::nullopt;
    const std::string_view part = word.substr(0, equals);
    const auto format = parse_activation_format(word.substr(equals + 1));
    if (!format) return std::nullopt;
    if (part == "head" || part == "lm_head") {
      choice.head = *format;
    } else if (part == "attention" && is_attention_activations(*format)) {
      choice.attention = *format;
    } else {
      return std::nullopt;
    }
  }
  return choice;
}

ActivationFormat ActivationChoice::of(std::string_view slot, const WeightFormat& weights,
                                      bool tied) const {
  if (slot == (tied ? "decoder.embedding" : "decoder.head")) return head;
  const bool lookup = slot == "decoder.embedding";
  return lookup || !linears.fits(weights) ? ActivationFormat{} : linears;
}

}  // namespace fq::model
