// config.json: every field arrives, and everything else than a valid description is refused with
// the path in the text.
#include "src/model/spec.h"

#include <gtest/gtest.h>

#include <functional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "src/model/directory.h"
#include "src/model/slots.h"
#include "tests/engine/testing/model_builder.h"

namespace fq::model {
namespace {

using nlohmann::json;
using testing::TinyModelOptions;

json config_of(const TinyModelOptions& options) {
  const testing::TempDir directory;
  return testing::write_tiny_model(directory.path(), options).config;
}

// One layer each, so that the tests that go through every key stay fast.
const json& vision_config() {
  static const json config = [] {
    TinyModelOptions options;
    options.layers = 1;
    options.vision = true;
    options.vision_layers = 1;
    options.post_norm = true;
    return config_of(options);
  }();
  return config;
}

Result<ModelSpec> parse(const json& config) { return parse_spec(config.dump(), "config"); }

TEST(Spec, QueriesAndKeysOfTheTowerAreFloat32OrA8) {
  json config = vision_config();
  EXPECT_FALSE(parse(config)->vision->attention_activations.quantized());
  config["vision"]["attention_activations"] = {{"bits", 8}, {"symmetric", true}};
  const auto spec = parse(config);
  ASSERT_TRUE(spec) << spec.error().to_string();
  EXPECT_EQ(spec->vision->attention_activations.name(), "a8");
  for (const auto& [bits, symmetric] : {std::pair{8, false}, {4, true}, {7, true}}) {
    config["vision"]["attention_activations"] = {{"bits", bits}, {"symmetric", symmetric}};
    const auto refused = parse(config);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Code::kCorruptModel);
    EXPECT_NE(refused.error().message.find("vision.attention_activations"), std::string::npos)
        << refused.error().message;
  }
}

TEST(Spec, AnActivationChoiceNamesItsParts) {
  const auto choice = parse_activation_choice("a8-asym,attention=a8,head=a4");
  ASSERT_TRUE(choice);
  EXPECT_EQ(choice->linears.name(), "a8-asym");
  EXPECT_EQ(choice->head.name(), "a4");
  EXPECT_EQ(choice->attention.name(), "a8");
  EXPECT_FALSE(parse_activation_choice("a8")->attention.quantized());
  EXPECT_FALSE(parse_activation_choice("a8,attention=a16")->attention.quantized());
  for (const char* text : {"attention=a8", "a8,attention", "a8,attention=", "a8,attention=abf16",
                           "a8,attention=a8-asym", "a8,attention=a8,", "a8,,head=a8"})
    EXPECT_FALSE(parse_activation_choice(text)) << text;
}

TEST(Spec, CarriesEveryFieldOfTheDecoder) {
  json config = config_of({});
  config["decoder"]["embedding_scale"] = 8.5;
  config["decoder"]["norm"]["eps"] = 1e-5;
  config["decoder"]["rope"] = {{"base", 5e5},
                               {"dims", 8},
                               {"scaling",
                                {{"kind", "llama3"},
                                 {"factor", 8.0},
                                 {"low_freq_factor", 1.0},
                                 {"high_freq_factor", 4.0},
                                 {"original_context", 8192}}}};
  config["tokens"]["bos"] = 1;
  config["tokens"]["add_bos"] = true;
  config["tokens"]["eos"] = {2, 3};
  config["defaults"] = {{"kv", "kv4"}, {"similarity_lower_bound", 0.6}};
  const auto spec = parse(config);
  ASSERT_TRUE(spec) << spec.error().to_string();
  EXPECT_EQ(spec->version, 1);
  EXPECT_EQ(spec->name, "tiny");
  EXPECT_EQ(spec->weights, "w4g32");
  EXPECT_EQ(spec->source.at("architecture"), "random");
  const DecoderSpec& d = spec->decoder;
  EXPECT_EQ(d.hidden, 64);
  EXPECT_EQ(d.layers, 2);
  EXPECT_EQ(d.vocab, 96);
  EXPECT_EQ(d.context, 4096);
  EXPECT_TRUE(d.tied_embedding);
  EXPECT_EQ(d.embedding_scale, 8.5f);
  EXPECT_EQ(d.norm.kind, NormKind::kRms);
  EXPECT_EQ(d.norm.eps, 1e-5f);
  EXPECT_EQ(d.attention.heads, 4);
  EXPECT_EQ(d.attention.kv_heads, 2);
  EXPECT_EQ(d.attention.head_dim, 16);
  EXPECT_TRUE(d.attention.qkv_bias);
  EXPECT_FALSE(d.attention.output_bias);
  EXPECT_EQ(d.attention.scale, 0.25f);
  EXPECT_EQ(d.rope.base, 5e5);
  EXPECT_EQ(d.rope.dims, 8);
  EXPECT_EQ(d.rope.scaling, RopeScaling::kLlama3);
  EXPECT_EQ(d.rope.factor, 8.0);
  EXPECT_EQ(d.rope.low_freq_factor, 1.0);
  EXPECT_EQ(d.rope.high_freq_factor, 4.0);
  EXPECT_EQ(d.rope.original_context, 8192);
  EXPECT_EQ(d.mlp.kind, MlpKind::kGated);
  EXPECT_EQ(d.mlp.activation, Activation::kSilu);
  EXPECT_EQ(d.mlp.hidden, 96);
  EXPECT_FALSE(d.mlp.bias);
  EXPECT_EQ(spec->tokens.bos, 1);
  EXPECT_TRUE(spec->tokens.add_bos);
  EXPECT_EQ(spec->tokens.eos, (std::vector<TokenId>{2, 3}));
  EXPECT_EQ(spec->tokens.media, "");
  EXPECT_EQ(spec->tokens.tokenizer, TokenizerKind::kHuggingFace);
  EXPECT_EQ(spec->tokens.tokenizer_file, "tokenizer.json");
  EXPECT_EQ(spec->defaults.kv, "kv4");
  EXPECT_EQ(spec->defaults.similarity_lower_bound, 0.6);
  EXPECT_FALSE(spec->vision || spec->projector || spec->visual);
  ASSERT_EQ(spec->files.size(), 2u);
  EXPECT_EQ(spec->files[0].name, "model-00001-of-00001.safetensors");
  EXPECT_EQ(spec->files[0].bytes, config["files"][0]["bytes"].get<uint64_t>());
  EXPECT_EQ(spec->files[0].sha256, config["files"][0]["sha256"].get<std::string>());
  const LinearSpec& gate = spec->linears.at("decoder.layers.1.mlp.gate");
  EXPECT_EQ(gate.out, 96);
  EXPECT_EQ(gate.in, 64);
  EXPECT_EQ(gate.format, testing::affine_format(4, 32));
}

TEST(Spec, CarriesEveryFieldOfVision) {
  const auto spec = parse(vision_config());
  ASSERT_TRUE(spec) << spec.error().to_string();
  ASSERT_TRUE(spec->vision && spec->projector && spec->visual);
  EXPECT_EQ(spec->vision->image_size, 16);
  EXPECT_EQ(spec->vision->patch, 4);
  EXPECT_EQ(spec->vision->grid(), 4);
  EXPECT_EQ(spec->vision->channels, 3);
  EXPECT_EQ(spec->vision->hidden, 32);
  EXPECT_EQ(spec->vision->layers, 1);
  EXPECT_TRUE(spec->vision->patch_bias);
  EXPECT_TRUE(spec->vision->post_norm);
  EXPECT_EQ(spec->vision->norm.kind, NormKind::kLayer);
  EXPECT_EQ(spec->vision->mlp.kind, MlpKind::kPlain);
  EXPECT_EQ(spec->vision->mlp.activation, Activation::kGelu);
  EXPECT_EQ(spec->projector->input, 32);
  EXPECT_EQ(spec->projector->hidden, 48);
  EXPECT_EQ(spec->projector->output, 64);
  EXPECT_EQ(spec->visual->pool, PoolMode::kBilinear);
  EXPECT_EQ(spec->visual->pool_stride, 2);
  EXPECT_EQ(spec->visual->newline, NewlineMode::kGrid);
  EXPECT_TRUE(spec->visual->image_newline);
  EXPECT_EQ(spec->visual->image_max_tiles, 9);
  EXPECT_EQ(spec->tokens.media, "<image>");
}

// Calls `visit` on every object of the document, with its path.
void for_each_object(const json& value, const json::json_pointer& at,
                     const std::function<void(const json::json_pointer&)>& visit) {
  if (value.is_object()) visit(at);
  if (!value.is_structured()) return;
  for (const auto& item : value.items()) {
    if (value.is_object()) {
      for_each_object(item.value(), at / item.key(), visit);
    } else {
      for_each_object(item.value(), at / std::stoul(item.key()), visit);
    }
  }
}

// Objects with free keys: removing or adding a key is an error of another kind, or none.
bool has_free_keys(const json::json_pointer& at) { return at.to_string() == "/source"; }

TEST(Spec, NoKeyCanBeMissingAndNoneAdded) {
  const json& config = vision_config();
  int objects = 0;
  for_each_object(config, json::json_pointer(), [&](const json::json_pointer& at) {
    if (has_free_keys(at)) return;
    ++objects;
    json extra = config;
    extra[at]["surprise"] = 1;
    const auto added = parse(extra);
    ASSERT_FALSE(added) << "unknown key accepted in " << at;
    EXPECT_EQ(added.error().code, Code::kCorruptModel);
    EXPECT_NE(added.error().message.find("\"surprise\""), std::string::npos)
        << added.error().message;
    for (const auto& item : config[at].items()) {
      json less = config;
      less[at].erase(item.key());
      const auto missing = parse(less);
      ASSERT_FALSE(missing) << "missing " << at << "/" << item.key() << " accepted";
      EXPECT_EQ(missing.error().code, Code::kCorruptModel);
      EXPECT_NE(missing.error().message.find(item.key() + ": missing"), std::string::npos)
          << missing.error().message;
    }
  });
  EXPECT_GT(objects, 50);  // the recursion really went through the document
}

TEST(Spec, EveryWrongTypeIsRefused) {
  const json& config = vision_config();
  const std::vector<json> values = {nullptr, true, -7, 0.5, "text", json::array(), json::object()};
  int refused = 0;
  for_each_object(config, json::json_pointer(), [&](const json::json_pointer& at) {
    for (const auto& item : config[at].items()) {
      const auto where = at / item.key();
      const std::string path = where.to_string();
      for (const json& value : values) {
        // The same type, or one that this key takes as well.
        if (value.type() == item.value().type()) continue;
        if (value.is_number() && item.value().is_number_float()) continue;
        if (value.is_null() && (path == "/tokens/bos" || path.ends_with("lower_bound"))) continue;
        if (value == 0.5 && path.ends_with("lower_bound")) continue;
        json wrong = config;
        wrong[where] = value;
        const auto spec = parse(wrong);
        ASSERT_FALSE(spec) << path << " accepted " << value;
        EXPECT_EQ(spec.error().code, Code::kCorruptModel) << path;
        ++refused;
      }
    }
  });
  EXPECT_GT(refused, 700);
}

struct Refusal {
  const char* what;
  const char* pointer;  // of the value to replace
  json value;
  const char* message;  // part of it
};

// Names a case by its name, not by the bytes of its pointers.
void PrintTo(const Refusal& value, std::ostream* out) { *out << value.what; }

class RefusedSpec : public ::testing::TestWithParam<Refusal> {};

TEST_P(RefusedSpec, NamesTheValue) {
  json config = vision_config();
  config[json::json_pointer(GetParam().pointer)] = GetParam().value;
  const auto spec = parse(config);
  ASSERT_FALSE(spec);
  EXPECT_EQ(spec.error().code, Code::kCorruptModel);
  EXPECT_NE(spec.error().message.find(GetParam().message), std::string::npos)
      << spec.error().message;
}

constexpr uint64_t kHuge = 1ull << 63;

INSTANTIATE_TEST_SUITE_P(
    Rules, RefusedSpec,
    ::testing::Values(
        Refusal{"NegativeHeads", "/decoder/attention/heads", -3,
                "decoder.attention.heads: expected integer in [1, 65536], got -3"},
        Refusal{"ZeroLayers", "/decoder/layers", 0,
                "decoder.layers: expected integer in [1, 1024]"},
        Refusal{"HugeLayers", "/decoder/layers", 1025, "got 1025"},
        Refusal{"BeyondInt64", "/decoder/hidden", kHuge, "got 9223372036854775808"},
        Refusal{"HiddenLimit", "/decoder/hidden", 65537, "decoder.hidden"},
        Refusal{"VocabLimit", "/decoder/vocab", (1 << 22) + 1, "decoder.vocab"},
        Refusal{"ContextLimit", "/decoder/context", (1 << 24) + 1, "decoder.context"},
        Refusal{"FloatForInteger", "/decoder/hidden", 64.0, "got 64 (not an integer)"},
        Refusal{"KvHeads", "/decoder/attention/kv_heads", 3,
                "decoder.attention.kv_heads: 3 does not divide heads, 4"},
        Refusal{"OddRope", "/decoder/rope/dims", 7, "decoder.rope.dims: expected an even number"},
        Refusal{"WideRope", "/decoder/rope/dims", 18, "up to head_dim, 16, got 18"},
        Refusal{"RopeScaling", "/decoder/rope/scaling/kind", "yarn",
                "decoder.rope.scaling.kind: expected one of \"none\", \"linear\", \"llama3\", "
                "got \"yarn\""},
        Refusal{"RopeKeysOfAnotherKind", "/decoder/rope/scaling/factor", 2.0,
                "decoder.rope.scaling: unknown key \"factor\""},
        Refusal{"Activation", "/decoder/mlp/activation", "tanh", "decoder.mlp.activation"},
        Refusal{"NormEps", "/decoder/norm/eps", 0.0, "decoder.norm.eps"},
        Refusal{"NegativeScale", "/decoder/attention/scale", -1.0, "decoder.attention.scale"},
        Refusal{"Patch", "/vision/patch", 17, "vision.patch: 17 is larger than image_size, 16"},
        Refusal{"GatedTower", "/vision/mlp/kind", "gated", "vision.mlp.kind"},
        Refusal{"ProjectorIn", "/projector/input", 33, "projector.input: expected 32, got 33"},
        Refusal{"ProjectorOut", "/projector/output", 63, "projector.output: expected 64, got 63"},
        Refusal{"PoolStride", "/visual/pool_stride", 5, "visual.pool_stride: expected at most"},
        Refusal{"HalfVision", "/visual", nullptr, "must be all null or all present"},
        Refusal{"HalfVision2", "/projector", nullptr, "must be all null or all present"},
        Refusal{"NoPlaceholder", "/tokens/media", "", "tokens.media: must not be empty"},
        Refusal{"BosRange", "/tokens/bos", 96, "tokens.bos: expected integer in [0, 95], got 96"},
        Refusal{"AddBosWithoutBos", "/tokens/add_bos", true, "tokens.add_bos"},
        Refusal{"EosRange", "/tokens/eos", json::array({2, 96}), "tokens.eos"},
        Refusal{"EosType", "/tokens/eos", json::array({"2"}), "got \"2\""},
        Refusal{"Tokenizer", "/tokens/tokenizer/file", "other.json", "is not listed in files"},
        Refusal{"Kv", "/defaults/kv", "kv5", "defaults.kv"},
        Refusal{"Similarity", "/defaults/similarity_lower_bound", 1.5, "[-1, 1], got 1.5"},
        Refusal{"LinearSize", "/linears/decoder.embedding/out", 95,
                "linears.decoder.embedding.out: expected integer in [96, 96], got 95"},
        Refusal{"LinearFormat", "/linears/decoder.embedding/format/kind", "gptq", "format.kind"},
        Refusal{"LinearBits", "/linears/decoder.embedding/format/bits", 7, "expected 2, 3, 4"},
        Refusal{"LinearGroup", "/linears/decoder.embedding/format/group", 48, "expected 0, 16, 32"},
        Refusal{"LinearScale", "/linears/decoder.embedding/format/scale", "bf16", "format.scale"},
        Refusal{"ExtraLinear", "/linears/decoder.head",
                json{{"out", 96}, {"in", 64}, {"format", {{"kind", "f32"}}}},
                "no slot is named \"decoder.head\""},
        Refusal{"ParentFile", "/files/0/name", "../model.safetensors", "files[0].name"},
        Refusal{"AbsoluteFile", "/files/0/name", "/etc/passwd", "files[0].name"},
        Refusal{"BackslashFile", "/files/0/name", "..\\x", "files[0].name"},
        Refusal{"DotFile", "/files/0/name", "..", "files[0].name"},
        Refusal{"EmptyFile", "/files/0/name", "", "files[0].name"},
        Refusal{"NulFile", "/files/0/name", std::string("a\0b", 3), "\"a\\x00b\""},
        Refusal{"ConfigFile", "/files/0/name", "config.json", "files[0].name"},
        Refusal{"TwiceFile", "/files/0/name", "tokenizer.json", "is listed twice"},
        Refusal{"NegativeBytes", "/files/0/bytes", -1, "files[0].bytes"},
        Refusal{"UpperHex", "/files/0/sha256", std::string(64, 'A'), "64 lower-case hex digits"},
        Refusal{"ShortHex", "/files/0/sha256", std::string(63, 'a'), "64 lower-case hex digits"},
        Refusal{"Format", "/format", "other-model", "format: expected one of"}),
    [](const auto& info) { return info.param.what; });

TEST(Spec, ALlamaScalingNeedsOrderedFrequencies) {
  json config = vision_config();
  config["decoder"]["rope"]["scaling"] = {{"kind", "llama3"},
                                          {"factor", 8.0},
                                          {"low_freq_factor", 4.0},
                                          {"high_freq_factor", 4.0},
                                          {"original_context", 8192}};
  EXPECT_FALSE(parse(config));
}

TEST(Spec, AnotherVersionIsAMismatchWhateverElseIsInIt) {
  for (const int version : {0, 2, 1000}) {
    const auto spec = parse({{"format", "framequilt-model"}, {"version", version}, {"new", 1}});
    ASSERT_FALSE(spec);
    EXPECT_EQ(spec.error().code, Code::kVersionMismatch);
    EXPECT_NE(spec.error().message.find("version " + std::to_string(version)), std::string::npos);
    EXPECT_FALSE(spec.error().hint.empty());
  }
}

TEST(Spec, DuplicateKeysAreRefusedAtAnyDepth) {
  const std::string text = vision_config().dump();
  for (const std::string key : {"\"version\":1", "\"heads\":4", "\"bits\":4"}) {
    const size_t at = text.find(key);
    ASSERT_NE(at, std::string::npos);
    const auto spec = parse_spec(std::string(text).insert(at, key + ","), "config");
    ASSERT_FALSE(spec);
    EXPECT_NE(spec.error().message.find("duplicate key"), std::string::npos);
  }
}

TEST(Spec, DeepNestingIsRefusedWithoutRecursion) {
  for (const char* open : {"[", "{\"a\":"}) {
    std::string text = "{\"source\":";
    for (int i = 0; i < 1'000'000; ++i) text += open;
    const auto spec = parse_spec(text, "config");
    ASSERT_FALSE(spec);
    EXPECT_NE(spec.error().message.find("nested deeper"), std::string::npos);
  }
}

TEST(Spec, HugeDocumentsAreRefusedBeforeTheyFillMemory) {
  std::string text = "{\"source\":[";
  for (int i = 0; i < 3'000'000; ++i) text += "0,";
  const auto spec = parse_spec(text, "config");
  ASSERT_FALSE(spec);
  EXPECT_NE(spec.error().message.find("keys and values"), std::string::npos);
}

TEST(Spec, WhatIsNotAJsonObjectIsRefused) {
  const std::string valid = vision_config().dump();
  for (const std::string text :
       {"", " ", "null", "[]", "1", "{", "{}x", "{\"a\":1,}", "{\"a\":01}", "{\"a\":1e999}",
        "{\"a\":NaN}", "{'a':1}", "{\"a\":\"\xff\"}", "// c\n{}"}) {
    const auto spec = parse_spec(text, "config");
    ASSERT_FALSE(spec) << text;
    EXPECT_EQ(spec.error().code, Code::kCorruptModel);
  }
  for (size_t length = 0; length < valid.size(); length += 13) {
    EXPECT_FALSE(parse_spec(valid.substr(0, length), "config")) << length;
  }
  EXPECT_FALSE(parse_spec(valid + "}", "config"));
  EXPECT_TRUE(parse_spec(valid + " \n", "config"));
}

TEST(Spec, MessagesStayPrintableWhateverTheKeysAre) {
  json config = vision_config();
  config["\x1b[31m\n\xc3\xa9"] = 1;
  const auto spec = parse(config);
  ASSERT_FALSE(spec);
  EXPECT_NE(spec.error().message.find("\"\\x1b[31m\\x0a\\xc3\\xa9\""), std::string::npos);
}

TEST(WeightFormat, NamesAreTheSchemesOwn) {
  EXPECT_EQ(testing::f32_format().name(), "f32");
  EXPECT_EQ(testing::bf16_format().name(), "bf16");
  EXPECT_EQ(testing::affine_format(4, 128).name(), "w4g128");
  EXPECT_EQ(testing::affine_format(4, 128, true).name(), "w4g128-sym");
  EXPECT_EQ(testing::affine_format(8, 0).name(), "w8row");
}

const char kUp[] = "decoder.layers.0.mlp.up";

// config.json with these weights and inputs of a linear.
json with_activations(const json& format, const json& activations) {
  json config = vision_config();
  config["linears"][kUp]["format"] = format;
  config["linears"][kUp]["activations"] = activations;
  return config;
}
const json kW4 = {
    {"kind", "affine"}, {"bits", 4}, {"group", 32}, {"symmetric", false}, {"scale", "f16"}};

TEST(ActivationFormat, IsReadForTheWeightsThatItFits) {
  const json bf16 = {{"kind", "bf16"}}, f32 = {{"kind", "f32"}};
  const json codes = {{"bits", 8}, {"symmetric", false}};
  const auto name = [](const json& config) {
    return parse(config)->linears.at(kUp).activations.name();
  };
  EXPECT_EQ(name(with_activations(kW4, bf16)), "abf16");
  EXPECT_EQ(name(with_activations(bf16, bf16)), "abf16");
  EXPECT_EQ(name(with_activations(kW4, codes)), "a8-asym");
  const std::pair<json, std::string> refused[] = {
      {with_activations(f32, bf16), ".activations.kind: inputs are rounded for bf16 and affine"},
      {with_activations(bf16, codes), ".activations.bits: activations are quantized for affine"},
      {with_activations(kW4, {{"kind", "f16"}}), "activations.kind: expected one of \"bf16\", got"},
      {with_activations(kW4, {{"kind", "bf16"}, {"bits", 8}}), "unknown key \"bits\""},
      {with_activations(kW4, {{"bits", 16}, {"symmetric", true}}), "activations.bits: expected"},
      {with_activations(kW4, {{"bits", 8}}), "symmetric: missing"}};
  for (const auto& [config, message] : refused) {
    const auto spec = parse(config);
    ASSERT_FALSE(spec) << message;
    EXPECT_EQ(spec.error().code, Code::kCorruptModel);
    EXPECT_NE(spec.error().message.find(message), std::string::npos) << spec.error().message;
  }
}

TEST(WeightFormat, ScalesInStepsAreOfGroups) {
  json stepped = kW4;
  stepped["scale"] = "i8";
  json config = vision_config();
  config["linears"][kUp]["format"] = stepped;
  const auto spec = parse(config);
  ASSERT_TRUE(spec) << spec.error().to_string();
  EXPECT_EQ(spec->linears.at(kUp).format.name(), "w4g32-i8scale");
  const auto tensors = linear_tensors("x", 20, 300, spec->linears.at(kUp).format);
  ASSERT_EQ(tensors.size(), 4u);
  EXPECT_EQ(tensors[2].name, "x.scale_steps");
  EXPECT_EQ(tensors[2].shape, (std::vector<int64_t>{4, 2, 8}));
  config["linears"][kUp]["format"]["group"] = 0;
  const auto refused = parse(config);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Code::kCorruptModel);
  EXPECT_NE(refused.error().message.find(".format.scale: i8, but a group is a whole row"),
            std::string::npos)
      << refused.error().message;
}

TEST(ActivationFormat, NamesAreReadBack) {
  for (const char* name : {"a16", "abf16", "a8", "a6", "a4", "a8-asym", "a6-asym", "a4-asym"}) {
    const auto format = parse_activation_format(name);
    ASSERT_TRUE(format) << name;
    EXPECT_EQ(format->name(), name);
  }
  for (const char* name : {"", "a", "abf16-asym", "abf", "bf16", "a16-asym", "a5"})
    EXPECT_FALSE(parse_activation_format(name)) << name;
}

TEST(ActivationChoice, IsForTheLinearsWhoseWeightsItFits) {
  const auto chosen = [](const char* text, const char* slot, const WeightFormat& weights) {
    return parse_activation_choice(text)->of(slot, weights, false).name();
  };
  const WeightFormat f32 = testing::f32_format(), bf16 = testing::bf16_format(),
                     w4 = testing::affine_format(4, 32);
  EXPECT_EQ(chosen("abf16", kUp, w4), "abf16");
  EXPECT_EQ(chosen("abf16", kUp, bf16), "abf16");
  EXPECT_EQ(chosen("abf16", kUp, f32), "a16");
  EXPECT_EQ(chosen("a8", kUp, w4), "a8");
  EXPECT_EQ(chosen("a8", kUp, bf16), "a16");
  EXPECT_EQ(chosen("abf16", "decoder.embedding", bf16), "a16");  // a lookup
  EXPECT_EQ(chosen("abf16", "decoder.head", bf16), "a16");       // has to be named
  EXPECT_EQ(chosen("a8,head=abf16", "decoder.head", bf16), "abf16");
}

// The shapes of the contract's section 1.3, worked out by hand for out = 17, in = 33.
TEST(Slots, LinearTensorsHaveTheShapesOfTheContract) {
  const auto shapes = [](const WeightFormat& format) {
    std::vector<std::vector<int64_t>> result;
    for (const TensorInfo& tensor : linear_tensors("x", 17, 33, format)) {
      result.push_back(tensor.shape);
    }
    return result;
  };
  using Shapes = std::vector<std::vector<int64_t>>;
  EXPECT_EQ(shapes(testing::f32_format()), (Shapes{{4, 33, 8}}));
  EXPECT_EQ(shapes(testing::bf16_format()), (Shapes{{4, 17, 8, 2}}));
  EXPECT_EQ(shapes(testing::affine_format(8, 32)), (Shapes{{4, 16, 8, 4}, {4, 2, 8}, {4, 2, 8}}));
  EXPECT_EQ(shapes(testing::affine_format(4, 64, true)), (Shapes{{4, 8, 8, 4}, {4, 1, 8}}));
  EXPECT_EQ(shapes(testing::affine_format(4, 0)), (Shapes{{4, 8, 8, 4}, {4, 1, 8}, {4, 1, 8}}));
}

}  // namespace
}  // namespace fq::model
