// Writes tiny random model directories for tests. Names, shapes and packing follow
// engine/CONTRACT.md and are written down here a second time on purpose: what the engine reads is
// compared with what this wrote, not with itself. Returns the stored values as float32, so a test
// can compute with them without the engine's unpacking.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "src/core/sha256.h"
#include "src/model/spec.h"
#include "tests/engine/testing/temp_dir.h"

namespace fq::testing {

inline model::WeightFormat f32_format() { return {.kind = model::WeightFormat::Kind::kF32}; }
inline model::WeightFormat bf16_format() { return {.kind = model::WeightFormat::Kind::kBF16}; }
// group 0: one group per output row.
inline model::WeightFormat affine_format(int bits, int group, bool symmetric = false,
                                         DType scale = DType::kF16) {
  return {model::WeightFormat::Kind::kAffine, bits, group, symmetric, scale};
}

struct TinyModelOptions {
  std::string name = "tiny";
  uint32_t seed = 1;
  int files = 1;  // weight files that the tensors are spread over

  // Decoder.
  int hidden = 64, layers = 2, vocab = 96, context = 4096;
  int heads = 4, kv_heads = 2, head_dim = 16, mlp_hidden = 96;
  bool tied_embedding = true;
  bool qkv_bias = true, output_bias = false, mlp_bias = false;
  float embedding_scale = 1.0f;
  std::string norm = "rms", mlp = "gated", activation = "silu";
  double rope_base = 10000.0;
  int rope_dims = 0;  // 0: head_dim
  nlohmann::json rope_scaling = {{"kind", "none"}};

  // Formats of all linears; `format_of` (when set) decides per slot name instead.
  model::WeightFormat format = affine_format(4, 32);
  std::function<model::WeightFormat(const std::string& slot)> format_of;
  float weight_gain = 1.0f;  // weights are uniform with variance gain^2 / in: rows keep their size

  // Vision: off unless asked for.
  bool vision = false;
  int image_size = 16, patch = 4, channels = 3;
  int vision_hidden = 32, vision_layers = 2, vision_heads = 2, vision_mlp_hidden = 64;
  bool patch_bias = true, post_norm = false;
  std::string vision_norm = "layer", vision_activation = "gelu";
  int projector_hidden = 48;
  std::string pool = "bilinear", newline = "grid";
  int pool_stride = 2;
  bool image_newline = true;
  int image_max_tiles = 9;

  // Tokens and defaults. `tokenizer` is the text of tokenizer.json.
  std::optional<int> bos;
  bool add_bos = false;
  std::vector<int> eos = {2};
  std::string media = "<image>";
  std::string tokenizer = "{}";
  std::string chat_template;  // "" writes none
  std::string kv = "kv8";
  std::optional<double> similarity_lower_bound;
};

// What a tiny model holds, as float32 exactly as stored: linears [out, in] row-major under their
// slot name
// ("decoder.embedding"), biases and vectors under their tensor name ("decoder.final_norm.weight").
struct TinyModel {
  nlohmann::json config;
  std::map<std::string, std::vector<float>> values;
};

namespace builder {

struct Tensor {
  std::string name, dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

template <class T>
void put(std::string& bytes, size_t index, T value) {
  std::memcpy(bytes.data() + index * sizeof(T), &value, sizeof(T));
}

// IEEE half, round to nearest even, by arithmetic on the value (no bit tricks shared with the
// engine).
inline uint16_t half_bits(float value) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude == 0.0) return static_cast<uint16_t>(sign);
  int exponent = std::max(std::ilogb(magnitude), -14);
  double digits = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  if (digits == 2048.0) {
    digits = 1024.0;
    ++exponent;
  }
  const int biased = digits >= 1024.0 ? exponent + 15 : 0;
  return static_cast<uint16_t>(sign | (biased << 10) | (static_cast<int>(digits) & 1023));
}

inline float half_value(uint16_t bits) {
  const int biased = (bits >> 10) & 31;
  const int digits = (bits & 1023) + (biased > 0 ? 1024 : 0);
  const double magnitude = std::ldexp(digits, std::max(biased, 1) - 25);
  return static_cast<float>((bits & 0x8000) != 0 ? -magnitude : magnitude);
}

inline uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline int tiles_of(int out) { return (out + 15) / 16 * 2; }

// Packs `w` [out, in] and replaces it by what was stored.
inline std::vector<Tensor> pack(const std::string& name, std::vector<float>& w, int out, int in,
                                const model::WeightFormat& format) {
  using Kind = model::WeightFormat::Kind;
  const int tiles = tiles_of(out);
  if (format.kind == Kind::kF32) {
    Tensor weight{name + ".weight", "F32", {tiles, in, 8}, std::string(size_t(tiles) * in * 32, 0)};
    for (int r = 0; r < out; ++r) {
      for (int c = 0; c < in; ++c) {
        put(weight.bytes, (size_t(r / 8) * in + c) * 8 + r % 8, w[size_t(r) * in + c]);
      }
    }
    return {weight};
  }
  if (format.kind == Kind::kBF16) {
    const int pairs = (in + 1) / 2;
    Tensor weight{
        name + ".weight", "BF16", {tiles, pairs, 8, 2}, std::string(size_t(tiles) * pairs * 32, 0)};
    for (int r = 0; r < out; ++r) {
      for (int c = 0; c < in; ++c) {
        float& value = w[size_t(r) * in + c];
        const uint16_t bits = bf16_bits(value);
        value = bf16_value(bits);
        put(weight.bytes, ((size_t(r / 8) * pairs + c / 2) * 8 + r % 8) * 2 + c % 2, bits);
      }
    }
    return {weight};
  }

  const int padded_in = (in + 31) / 32 * 32;
  const int group = format.group == 0 ? padded_in : format.group;
  const int groups = format.group == 0 ? 1 : (in + group - 1) / group;
  const int levels = 1 << format.bits;
  const int blocks = padded_in / 32 * format.bits;
  const bool half = format.scale == DType::kF16, stepped = format.stepped();
  const int steps = (in + 255) / 256;
  Tensor codes{
      name + ".codes", "U8", {tiles, blocks, 8, 4}, std::string(size_t(tiles) * blocks * 32, 0)};
  Tensor scales{name + ".scales",
                stepped ? "I8"
                : half  ? "F16"
                        : "F32",
                {tiles, groups, 8},
                std::string(size_t(tiles) * groups * 8 * dtype_bytes(format.scale), 0)};
  // All the same: a scale is 1 to 127 times this.
  Tensor scale_steps{name + ".scale_steps",
                     "F16",
                     {tiles, steps, 8},
                     std::string(size_t(tiles) * steps * 8 * 2, 0)};
  const float step = half_value(half_bits(0.01f / static_cast<float>(levels)));
  for (int at = 0; stepped && at < tiles * steps * 8; ++at)
    put(scale_steps.bytes, size_t(at), half_bits(step));
  Tensor zeros{
      name + ".zeros", "U8", {tiles, groups, 8}, std::string(size_t(tiles) * groups * 8, 0)};
  for (int r = 0; r < tiles * 8; ++r) {
    for (int g = 0; g < groups; ++g) {
      float low = 0.0f, high = 0.0f;  // the range always contains zero
      for (int c = g * group; r < out && c < std::min(in, (g + 1) * group); ++c) {
        low = std::min(low, w[size_t(r) * in + c]);
        high = std::max(high, w[size_t(r) * in + c]);
      }
      const float span = format.symmetric ? 2 * std::max(-low, high) : high - low;
      float scale = span / static_cast<float>(format.symmetric ? levels - 2 : levels - 1);
      const size_t at = (size_t(r / 8) * groups + g) * 8 + r % 8;
      if (half) {
        put(scales.bytes, at, half_bits(scale));
        scale = half_value(half_bits(scale));
      } else if (stepped) {
        const float factor = std::clamp(std::ceil(scale / step), 0.0f, 127.0f);
        put(scales.bytes, at, static_cast<int8_t>(factor));
        scale = factor * step;
      } else {
        put(scales.bytes, at, scale);
      }
      int zero = format.symmetric ? levels / 2 : 0;
      if (!format.symmetric && scale > 0) {
        zero = std::clamp(static_cast<int>(std::nearbyint(-low / scale)), 0, levels - 1);
      }
      zeros.bytes[at] = static_cast<char>(zero);
      for (int c = g * group; c < std::min(padded_in, (g + 1) * group); ++c) {
        int code = zero;
        if (r < out && c < in) {
          float& value = w[size_t(r) * in + c];
          if (scale > 0) {
            code =
                std::clamp(static_cast<int>(std::nearbyint(value / scale)) + zero, 0, levels - 1);
          }
          value = static_cast<float>(code - zero) * scale;
        }
        // A superblock of 32 inputs: planes of 8, 4 (+ 2 or 1) or 2 (+ 1) bits, one after another.
        size_t block = size_t(r / 8) * blocks + size_t(c / 32) * format.bits;
        for (int left = format.bits, done = 0; left > 0;) {
          const int plane = left == 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
          const int per_block = 32 / plane, inside = c % 32 % per_block;
          const size_t byte =
              ((block + size_t(c % 32 / per_block)) * 8 + r % 8) * 4 + size_t(inside % 4);
          const int part = code >> done & ((1 << plane) - 1);
          codes.bytes[byte] = static_cast<char>(codes.bytes[byte] | part << inside / 4 * plane);
          block += size_t(plane);
          left -= plane;
          done += plane;
        }
      }
    }
  }
  std::vector<Tensor> result = {codes, scales};
  if (stepped) result.push_back(scale_steps);
  if (!format.symmetric) result.push_back(zeros);
  return result;
}

// A safetensors file image: whole cache lines first, the rest followed by pads, as the contract
// asks.
inline std::string safetensors(std::vector<Tensor> tensors) {
  std::stable_partition(tensors.begin(), tensors.end(),
                        [](const Tensor& t) { return t.bytes.size() % 64 == 0; });
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  int pads = 0;
  const auto add = [&](const Tensor& t) {
    header[t.name] = {{"dtype", t.dtype},
                      {"shape", t.shape},
                      {"data_offsets", {data.size(), data.size() + t.bytes.size()}}};
    data += t.bytes;
  };
  for (const Tensor& t : tensors) {
    add(t);
    const size_t missing = (64 - data.size() % 64) % 64;
    if (missing == 0) continue;
    add({"pad." + std::to_string(pads++), "U8", {int64_t(missing)}, std::string(missing, 0)});
  }
  std::string text = header.dump();
  text.append((64 - (text.size() + 8) % 64) % 64, ' ');
  std::string file(8, 0);
  put(file, 0, static_cast<uint64_t>(text.size()));
  return file + text + data;
}

class Builder {
 public:
  explicit Builder(const TinyModelOptions& options) : options_(options), random_(options.seed) {}

  void linear(const std::string& name, int out, int in, bool bias) {
    const model::WeightFormat format =
        options_.format_of ? options_.format_of(name) : options_.format;
    const float range = options_.weight_gain * std::sqrt(3.0f / static_cast<float>(in));
    std::vector<float> w = uniform(size_t(out) * in, -range, range);
    for (Tensor& t : pack(name, w, out, in, format)) tensors_.push_back(std::move(t));
    values_[name] = std::move(w);
    linears_[name] = {{"out", out}, {"in", in}, {"format", format_json(format)}};
    if (bias) vector(name + ".bias", {out}, -0.1f, 0.1f);
  }

  void vector(const std::string& name, std::vector<int64_t> shape, float low, float high) {
    size_t count = 1;
    for (const int64_t dim : shape) count *= static_cast<size_t>(dim);
    std::vector<float> v = uniform(count, low, high);
    std::string bytes(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(float));
    tensors_.push_back({name, "F32", std::move(shape), std::move(bytes)});
    values_[name] = std::move(v);
  }

  void norm(const std::string& name, int width, bool layer) {
    vector(name + ".weight", {width}, 0.8f, 1.2f);
    if (layer) vector(name + ".bias", {width}, -0.1f, 0.1f);
  }

  std::vector<Tensor> tensors_;
  std::map<std::string, std::vector<float>> values_;
  nlohmann::json linears_ = nlohmann::json::object();

 private:
  static nlohmann::json format_json(const model::WeightFormat& format) {
    if (format.kind == model::WeightFormat::Kind::kF32) return {{"kind", "f32"}};
    if (format.kind == model::WeightFormat::Kind::kBF16) return {{"kind", "bf16"}};
    return {{"kind", "affine"},
            {"bits", format.bits},
            {"group", format.group},
            {"symmetric", format.symmetric},
            {"scale", format.stepped()              ? "i8"
                      : format.scale == DType::kF16 ? "f16"
                                                    : "f32"}};
  }

  // Own mapping from generator to floats: std distributions differ between libraries.
  std::vector<float> uniform(size_t count, float low, float high) {
    std::vector<float> v(count);
    for (float& x : v) x = low + (high - low) * (static_cast<float>(random_() >> 8) * 0x1p-24f);
    return v;
  }

  const TinyModelOptions& options_;
  std::mt19937 random_;
};

inline nlohmann::json attention_json(int heads, int kv_heads, int head_dim, bool qkv_bias,
                                     bool output_bias) {
  return {
      {"heads", heads},       {"kv_heads", kv_heads},       {"head_dim", head_dim},
      {"qkv_bias", qkv_bias}, {"output_bias", output_bias}, {"scale", 1.0 / std::sqrt(head_dim)}};
}

inline nlohmann::json decoder_json(const TinyModelOptions& o) {
  return {{"hidden", o.hidden},
          {"layers", o.layers},
          {"vocab", o.vocab},
          {"context", o.context},
          {"tied_embedding", o.tied_embedding},
          {"embedding_scale", o.embedding_scale},
          {"norm", {{"kind", o.norm}, {"eps", 1e-6}}},
          {"attention", attention_json(o.heads, o.kv_heads, o.head_dim, o.qkv_bias, o.output_bias)},
          {"rope",
           {{"base", o.rope_base},
            {"dims", o.rope_dims == 0 ? o.head_dim : o.rope_dims},
            {"scaling", o.rope_scaling}}},
          {"mlp",
           {{"kind", o.mlp},
            {"activation", o.activation},
            {"hidden", o.mlp_hidden},
            {"bias", o.mlp_bias}}}};
}

inline void add_decoder(const TinyModelOptions& o, Builder& b) {
  const bool layer_norm = o.norm == "layer";
  b.linear("decoder.embedding", o.vocab, o.hidden, false);
  for (int i = 0; i < o.layers; ++i) {
    const std::string block = "decoder.layers." + std::to_string(i);
    b.norm(block + ".attention_norm", o.hidden, layer_norm);
    b.linear(block + ".attention.q", o.heads * o.head_dim, o.hidden, o.qkv_bias);
    b.linear(block + ".attention.k", o.kv_heads * o.head_dim, o.hidden, o.qkv_bias);
    b.linear(block + ".attention.v", o.kv_heads * o.head_dim, o.hidden, o.qkv_bias);
    b.linear(block + ".attention.o", o.hidden, o.heads * o.head_dim, o.output_bias);
    b.norm(block + ".mlp_norm", o.hidden, layer_norm);
    if (o.mlp == "gated") b.linear(block + ".mlp.gate", o.mlp_hidden, o.hidden, o.mlp_bias);
    b.linear(block + ".mlp.up", o.mlp_hidden, o.hidden, o.mlp_bias);
    b.linear(block + ".mlp.down", o.hidden, o.mlp_hidden, o.mlp_bias);
  }
  b.norm("decoder.final_norm", o.hidden, layer_norm);
  if (!o.tied_embedding) b.linear("decoder.head", o.vocab, o.hidden, false);
}

inline void add_vision(const TinyModelOptions& o, Builder& b, nlohmann::json& config) {
  const int head_dim = o.vision_hidden / o.vision_heads;
  const int grid = o.image_size / o.patch;
  const bool layer_norm = o.vision_norm == "layer";
  config["vision"] = {
      {"image_size", o.image_size},
      {"patch", o.patch},
      {"channels", o.channels},
      {"hidden", o.vision_hidden},
      {"layers", o.vision_layers},
      {"patch_bias", o.patch_bias},
      {"post_norm", o.post_norm},
      {"norm", {{"kind", o.vision_norm}, {"eps", 1e-6}}},
      {"attention", attention_json(o.vision_heads, o.vision_heads, head_dim, true, true)},
      {"mlp",
       {{"kind", "plain"},
        {"activation", o.vision_activation},
        {"hidden", o.vision_mlp_hidden},
        {"bias", true}}}};
  config["projector"] = {{"kind", "mlp"},
                         {"input", o.vision_hidden},
                         {"hidden", o.projector_hidden},
                         {"output", o.hidden},
                         {"activation", "gelu"}};
  config["visual"] = {{"pool", o.pool},
                      {"pool_stride", o.pool_stride},
                      {"newline", o.newline},
                      {"image_newline", o.image_newline},
                      {"image_max_tiles", o.image_max_tiles}};

  b.linear("vision.patch_embedding", o.vision_hidden, o.channels * o.patch * o.patch, o.patch_bias);
  b.vector("vision.position", {grid * grid, o.vision_hidden}, -0.5f, 0.5f);
  for (int i = 0; i < o.vision_layers; ++i) {
    const std::string block = "vision.layers." + std::to_string(i);
    b.norm(block + ".attention_norm", o.vision_hidden, layer_norm);
    for (const char* part : {"q", "k", "v", "o"}) {
      b.linear(block + ".attention." + part, o.vision_hidden, o.vision_hidden, true);
    }
    b.norm(block + ".mlp_norm", o.vision_hidden, layer_norm);
    b.linear(block + ".mlp.up", o.vision_mlp_hidden, o.vision_hidden, true);
    b.linear(block + ".mlp.down", o.vision_hidden, o.vision_mlp_hidden, true);
  }
  if (o.post_norm) b.norm("vision.post_norm", o.vision_hidden, layer_norm);
  b.linear("projector.layers.0", o.projector_hidden, o.vision_hidden, true);
  b.linear("projector.layers.1", o.hidden, o.projector_hidden, true);
  if (o.newline != "none" || o.image_newline) {
    b.vector("visual.newline", {o.hidden}, -0.5f, 0.5f);
  }
}

}  // namespace builder

// Writes the directory `path` (made if it is not there) and returns what it holds. Aborts when the
// file system refuses.
inline TinyModel write_tiny_model(const std::filesystem::path& path,
                                  const TinyModelOptions& options) {
  using nlohmann::json;
  std::filesystem::create_directories(path);
  builder::Builder b(options);
  json config = {{"format", "framequilt-model"},
                 {"version", 1},
                 {"name", options.name},
                 {"source", {{"architecture", "random"}}},
                 {"weights", options.format.name()},
                 {"decoder", builder::decoder_json(options)},
                 {"vision", nullptr},
                 {"projector", nullptr},
                 {"visual", nullptr}};
  builder::add_decoder(options, b);
  if (options.vision) builder::add_vision(options, b, config);
  config["tokens"] = {{"bos", options.bos ? json(*options.bos) : json(nullptr)},
                      {"add_bos", options.add_bos},
                      {"eos", options.eos},
                      {"media", options.vision ? options.media : ""},
                      {"tokenizer", {{"kind", "huggingface"}, {"file", "tokenizer.json"}}}};
  config["defaults"] = {
      {"kv", options.kv},
      {"similarity_lower_bound",
       options.similarity_lower_bound ? json(*options.similarity_lower_bound) : json(nullptr)}};
  config["linears"] = b.linears_;
  config["files"] = json::array();
  const auto add_file = [&](const std::string& name, const std::string& bytes) {
    write_file(path / name, bytes);
    config["files"].push_back({{"name", name},
                               {"bytes", bytes.size()},
                               {"sha256", sha256_hex(std::as_bytes(std::span(bytes)))}});
  };
  for (int i = 0; i < options.files; ++i) {
    std::vector<builder::Tensor> part;
    for (size_t t = 0; t < b.tensors_.size(); ++t) {
      if (static_cast<int>(t) % options.files == i) part.push_back(b.tensors_[t]);
    }
    char name[64];
    std::snprintf(name, sizeof(name), "model-%05d-of-%05d.safetensors", i + 1, options.files);
    add_file(name, builder::safetensors(std::move(part)));
  }
  add_file("tokenizer.json", options.tokenizer);
  if (!options.chat_template.empty()) add_file("chat_template.jinja", options.chat_template);
  if (options.vision) {
    const json preprocessor = {{"size", options.image_size},     {"resample", "bicubic"},
                               {"mean", {0.5, 0.5, 0.5}},        {"std", {0.5, 0.5, 0.5}},
                               {"rescale", 0.00392156862745098}, {"image_grid_pinpoints", nullptr},
                               {"time_instruction", false}};
    add_file("preprocessor.json", preprocessor.dump(2));
  }
  write_file(path / "config.json", config.dump(2));
  return {std::move(config), std::move(b.values_)};
}

}  // namespace fq::testing
