// What a model is: pure data, read from config.json (format in engine/CONTRACT.md, "Model
// directory"). A closed vocabulary of blocks with few options each; no family names.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "framequilt/types.h"

namespace fq::model {

enum class NormKind : uint8_t { kRms, kLayer };
enum class Activation : uint8_t { kRelu, kGelu, kGeluTanh, kSilu };
enum class MlpKind : uint8_t { kPlain, kGated };
enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3 };
enum class PoolMode : uint8_t { kNone, kBilinear, kAverage, kMax };
enum class NewlineMode : uint8_t { kNone, kGrid, kFrame, kOneToken };
enum class TokenizerKind : uint8_t { kHuggingFace, kSentencePiece };

struct NormSpec {
  NormKind kind = NormKind::kRms;
  float eps = 1e-6f;
};

struct RopeSpec {
  double base = 10000.0;
  int dims = 0;  // rotated leading dims of each head; rotate-half pairs (i, i + dims/2)
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;
  // kLlama3 only
  double low_freq_factor = 1.0, high_freq_factor = 4.0;
  int original_context = 0;
};

struct AttentionSpec {
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  bool qkv_bias = false;
  bool output_bias = false;
  float scale = 0.0f;  // multiplies q.k
};

struct MlpSpec {
  MlpKind kind = MlpKind::kGated;
  Activation activation = Activation::kSilu;
  int hidden = 0;
  bool bias = false;
};

struct DecoderSpec {
  int hidden = 0, layers = 0, vocab = 0, context = 0;
  bool tied_embedding = false;
  float embedding_scale = 1.0f;
  NormSpec norm;
  AttentionSpec attention;
  RopeSpec rope;
  MlpSpec mlp;
};

struct WeightFormat;

// What the input rows of a linear become before the product (engine/CONTRACT.md, 1.4): codes, per
// token and dynamic, or bfloat16 numbers, or nothing else than they are.
struct ActivationFormat {
  int bits = 16;  // of a code: 8, 6 or 4; 16: no codes (float32 inputs, or bfloat16)
  bool symmetric = true;
  bool bf16 = false;  // rounded to bfloat16; not together with codes
  bool quantized() const { return bits != 16; }
  bool float32() const { return !quantized() && !bf16; }
  // Whether linears of such weights take these inputs: codes need codes, and bfloat16 is not for
  // weights that have more bits themselves.
  bool fits(const WeightFormat& weights) const;
  // Whether a product needs the sums of the weights' rows: a zero multiplies them.
  bool needs_row_sums() const { return quantized() && !symmetric; }
  std::string name() const;  // "a16", "abf16", "a8", "a6", "a4", "a8-asym", ...
  bool operator==(const ActivationFormat&) const = default;
};

// A tower of pre-norm encoder blocks over non-overlapping patches, learned positions, no class
// token.
struct VisionSpec {
  int image_size = 0, patch = 0, channels = 3;
  int hidden = 0, layers = 0;
  bool patch_bias = true;
  bool post_norm = false;
  NormSpec norm;
  AttentionSpec attention;
  ActivationFormat attention_activations;  // of queries and keys: float32, or a8
  MlpSpec mlp;
  int grid() const { return image_size / patch; }
};

struct ProjectorSpec {
  int input = 0, hidden = 0, output = 0;
  Activation activation = Activation::kGelu;
};

// From projected patches to rows of the prompt.
struct VisualSpec {
  PoolMode pool = PoolMode::kNone;  // video frames
  int pool_stride = 1;
  NewlineMode newline = NewlineMode::kNone;  // video
  // Images: overview unpooled, then the tile grid cropped to the picture, each grid row followed by
  // a newline if image_newline. Grids larger than max_tiles tiles are shrunk bilinearly (0: never).
  bool image_newline = false;
  int image_max_tiles = 0;
};

struct TokenSpec {
  std::optional<TokenId> bos;
  bool add_bos = false;
  std::vector<TokenId> eos;
  std::string media;  // placeholder text in the chat template's output; "" for text models
  TokenizerKind tokenizer = TokenizerKind::kHuggingFace;
  std::string tokenizer_file;
};

struct DefaultsSpec {
  std::string kv = "kv8";
  std::optional<double> similarity_lower_bound;  // recommended for token reduction
};

// Number format of one linear's weights (engine/CONTRACT.md, "Weight formats").
struct WeightFormat {
  enum class Kind : uint8_t { kF32, kBF16, kAffine };
  Kind kind = Kind::kBF16;
  int bits = 0;   // kAffine: 2, 3, 4, 5, 6 or 8
  int group = 0;  // kAffine: inputs per group (16, 32, 64, 128), 0: one group per output row
  bool symmetric = false;
  // kAffine, of scales and offsets: F16, F32, or I8, which are factors of F16 steps.
  DType scale = DType::kF16;
  bool offset = false;       // kAffine, not symmetric: a float offset instead of an integer zero
  std::string name() const;  // "f32", "bf16", "w4g128", "w4g128-sym", "w8row", "w4g32-offset"
  bool stepped() const { return kind == Kind::kAffine && scale == DType::kI8; }
  bool operator==(const WeightFormat&) const = default;
};
inline constexpr int kStepInputs = 256;  // of a row, share a step
// What the kernels and readers support; the other kinds are always valid.
bool is_affine_bits(int bits);
bool is_affine_group(int group);
bool is_affine_format(const WeightFormat& format);
inline constexpr const char* kAffineFormats =
    "2 to 6 or 8 bits, groups of 16, 32, 64, 128 or 0 (per row), F16 or F32 scales, or I8 with "
    "groups of 16 to 128; an offset where codes are not symmetric";

// The format of a name, or nothing.
std::optional<ActivationFormat> parse_activation_format(std::string_view name);
// Whether queries and keys can have it.
bool is_attention_activations(const ActivationFormat& format);

struct LinearSpec {
  int out = 0;
  int in = 0;
  WeightFormat format;
  ActivationFormat activations;
};

// Inputs of a whole model, as an engine is asked for them: "a8", or "a8,head=a8,attention=a8". The
// same rule as the converter's (engine/CONTRACT.md, 1.4): the word for all is for every linear
// whose weights it fits but the head, which has to be named, and so has the attention of the vision
// tower.
struct ActivationChoice {
  ActivationFormat linears;
  ActivationFormat head;       // float32 unless named
  ActivationFormat attention;  // likewise
  // What the linear `slot` gets; `tied`: the embedding is the head.
  ActivationFormat of(std::string_view slot, const WeightFormat& weights, bool tied) const;
};
std::optional<ActivationChoice> parse_activation_choice(std::string_view text);

struct FileSpec {
  std::string name;
  uint64_t bytes = 0;
  std::string sha256;
};

struct ModelSpec {
  int version = 1;
  std::string name;
  std::map<std::string, std::string>
      source;  // free text about origin, for inspect; never interpreted
  DecoderSpec decoder;
  std::optional<VisionSpec> vision;
  std::optional<ProjectorSpec> projector;
  std::optional<VisualSpec> visual;
  TokenSpec tokens;
  DefaultsSpec defaults;
  std::string weights;  // the scheme the converter was asked for, e.g. "w4g128"
  std::map<std::string, LinearSpec> linears;  // every linear by its slot name
  std::vector<FileSpec> files;
};

}  // namespace fq::model
