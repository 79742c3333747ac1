// Contracts of the ops that blocks are made of. Every op has a scalar reference here
// (`*_reference`, in ops/*.cc) and fast versions in a backend, tested against it. All activations
// are float32, rows are flat: [rows, width], a row starts every `stride` floats. Nothing here owns
// memory; nothing fails: shapes were checked when blocks were bound.
//
// Determinism: the value of one output row depends on that row's inputs only, never on how many
// rows, in which tile or on which thread it is computed. So fast kernels accumulate each output in
// one fixed order over its reduction axis:
//   linear:     one float32 accumulator per output, inputs in ascending order, fused multiply-add
//               of the dequantized weight; then + bias; then the activation, if any; then, if
//               `accumulate`, + the old value, or, if `multiply`, * the old value.
//               Quantized inputs: products summed as integers over each group (at most
//               kIntegerSpan inputs), then for each in ascending order sum = fma(scale, products,
//               sum), sum = fma(shift, inputs, sum), shift = -zero * scale or the offset;
//               then (asymmetric) - zero_x * row_sums; then * scale_x, + bias and so on.
//               Inputs in bfloat16: products of the rounded input and the weight (affine: code -
//               zero) summed in float32 over each group (at most kRoundedSpan inputs), then for
//               each in ascending order sum = fma(scale, products, sum) (bf16 weights: scale 1),
//               with an offset sum = fma(offset, rounded inputs, sum); then + bias and so on.
//               Within a group the reference adds products one by one; a kernel may add them in
//               pairs, in an order of its own that is the same for every row.
//   attention:  scores one accumulator over the dims of a group ascending; softmax online over the
//               pages of a chunk ascending, chunks merged ascending (see attention.cc).
//   norms, similarity: 16 interleaved partial sums (see math.h).
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "src/model/spec.h"
#include "src/quant/kv_format.h"
#include "src/quant/linear_weights.h"

namespace fq::ops {

// The weights of linears that a call is likely to be followed by, which are computed together: what
// threads with nothing left to do ask memory for. Says all that this takes; not the steps of
// scales, which are a hundredth of it.
struct LinearsAhead {
  static constexpr int kMost = 3;
  struct Weights {
    const void *data = nullptr, *scales = nullptr, *shifts = nullptr;  // shifts: zeros or offsets
    int tiles = 0;
  };
  Weights linears[kMost];  // in order, all of one format and with as many inputs
  int count = 0;
  int64_t bytes = 0;  // of a tile: all, and those of each table
  int data_bytes = 0, scale_bytes = 0, shift_bytes = 0;
  bool by_turns = false;  // a piece of each after the other (LinearArgs::multiply)

  void add(const quant::LinearWeights& w);
};

struct LinearArgs {
  const float* x = nullptr;  // [rows, in]
  int64_t x_stride = 0;
  int64_t rows = 0;
  const quant::LinearWeights* w = nullptr;
  float* y = nullptr;  // [rows, out]
  int64_t y_stride = 0;
  bool accumulate = false;  // y += instead of y =
  // What the inputs become first (engine/CONTRACT.md, 1.4), where it fits the weights.
  model::ActivationFormat activations = {};
  // Applied to the sum with its bias: y = act(...). Not together with `accumulate`.
  std::optional<model::Activation> activation = {};
  bool multiply = false;  // y = act(...) * old y: the gate of an MLP. Needs `activation`
  // A further linear of the same inputs (x, x_stride, rows, activations) and the same weight format
  // and group, computed in the same call: one hand-out of work, inputs quantized once. One that
  // multiplies has the y and the width of the one before it, and finds it written.
  const LinearArgs* next = nullptr;
  // Of the first linear of a call: what the call after it reads, or nullptr. Changes no result.
  const LinearsAhead* ahead = nullptr;
};
void linear_reference(const LinearArgs& args);  // and all that follow

struct NormArgs {
  const float* x = nullptr;  // [rows, width]
  float* y = nullptr;        // may be x
  int64_t rows = 0, width = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;  // layer norm only
  float eps = 0;
};
void rms_norm_reference(const NormArgs& args);  // y = x / sqrt(mean(x^2) + eps) * weight
// y = (x - mean) / sqrt(var + eps) * weight + bias
void layer_norm_reference(const NormArgs& args);

// Rotary table: cos and sin of position * inv_freq[i], computed in float32 like the published
// models.
struct RopeTable {
  const float* inv_freq = nullptr;  // [dims/2]
  int dims = 0;
};
// In place: for each row and head rotates pairs (i, i + dims/2) of the leading `dims` dims.
struct RopeArgs {
  float* x = nullptr;  // [rows, heads * head_dim]
  int64_t stride = 0;
  int64_t rows = 0;
  int heads = 0, head_dim = 0;
  const int32_t* positions = nullptr;  // [rows], ORIGINAL positions
  RopeTable table;
};
void rope_reference(const RopeArgs& args);

// K and V of one layer of one sequence: pages in order. `pages[i]` points at page i of the table.
struct KvView {
  const quant::KvPageLayout* layout = nullptr;
  std::byte* const* pages = nullptr;
  int64_t length = 0;  // tokens stored
};

// Writes rows as tokens [begin, begin + rows) of the view (whose pages exist). length is not used.
struct KvAppendArgs {
  const float* k = nullptr;  // [rows, kv_heads * head_dim]
  const float* v = nullptr;
  int64_t k_stride = 0, v_stride = 0;
  int64_t rows = 0;
  int64_t begin = 0;
  KvView kv;
};
void kv_append_reference(const KvAppendArgs& args);

// Tokens whose softmax is computed alone and then merged: what threads share the pages of one
// sequence by. Fixed, so that results do not depend on how they are shared.
inline constexpr int64_t kAttentionChunk = 8 * quant::kPageTokens;

// Causal attention of consecutive rows of one sequence over its pages: row i sees tokens [0, begin
// + i]. out = softmax(scale * q K^T) V. GQA: query head h reads kv head h / (heads / kv_heads).
struct AttentionArgs {
  const float* q = nullptr;  // [rows, heads * head_dim]
  int64_t q_stride = 0;
  float* out = nullptr;  // [rows, heads * head_dim]
  int64_t out_stride = 0;
  int64_t rows = 0;
  int64_t begin = 0;
  int heads = 0;
  float scale = 0;
  KvView kv;
  bool exact = false;  // codes are multiplied as float32 numbers: slow, to compare with
};
void attention_reference(const AttentionArgs& args);

// Importance for token reduction: mean over heads and queries of the softmax probabilities of the
// given query rows (the last ones of the sequence: query i sees tokens [0, kv.length - queries +
// i]). out [kv.length].
struct ImportanceArgs {
  const float* q = nullptr;  // [queries, heads * head_dim], after rope
  int64_t q_stride = 0;
  int queries = 1;
  int heads = 0;
  float scale = 0;
  KvView kv;
  float* out = nullptr;
  bool exact = false;  // as above
};
void importance_reference(const ImportanceArgs& args);

// Full (non-causal) attention inside independent blocks of `tokens` rows (frames of a vision
// tower), unpaged.
struct EncoderAttentionArgs {
  const float* q = nullptr;  // [blocks * tokens, heads * head_dim]
  const float* k = nullptr;
  const float* v = nullptr;
  float* out = nullptr;
  int64_t stride = 0;  // of all four
  int64_t blocks = 0, tokens = 0;
  int heads = 0, head_dim = 0;
  float scale = 0;
};
void encoder_attention_reference(const EncoderAttentionArgs& args);
// The same with 8-bit queries and keys, see ops/integer_attention.cc. More tokens could overflow
// the sum of the probabilities' codes.
inline constexpr int64_t kIntegerAttentionMostTokens = (int64_t{1} << (31 - 13)) - 1;
void integer_encoder_attention_reference(const EncoderAttentionArgs& args);

// y = act(x), or y = act(x) * gate when gate is not null; elementwise over [rows, width].
struct ActivationArgs {
  model::Activation kind = model::Activation::kSilu;
  const float* x = nullptr;
  const float* gate = nullptr;
  float* y = nullptr;  // may be x
  int64_t count = 0;   // elements
};
void activation_reference(const ActivationArgs& args);

// cosine of row i with row prev[i]; -2 where prev[i] < 0 or a norm is zero or not finite. out
// [rows].
struct SimilarityArgs {
  const float* x = nullptr;  // [rows, width]
  int64_t stride = 0;
  int64_t rows = 0, width = 0;
  const int32_t* prev = nullptr;
  float* out = nullptr;
};
void similarity_reference(const SimilarityArgs& args);

}  // namespace fq::ops
