// The decoder: embedding, layers, final norm and head, bound once from the model's description.
// Immutable after bind(); the caller owns all scratch.
#pragma once

#include <memory>
#include <vector>

#include "src/blocks/attention.h"
#include "src/blocks/mlp.h"

namespace fq::blocks {

struct DecoderLayer {
  DecoderAttention attention;
  Mlp mlp;
};

class Decoder {
 public:
  static Result<std::unique_ptr<const Decoder>> bind(const Binder& binder, quant::KvFormat kv);

  const model::DecoderSpec& spec() const { return spec_; }
  const quant::KvFormat& kv_format() const { return kv_format_; }
  const quant::KvPageLayout& kv_layout(int layer) const {
    return layouts_[static_cast<size_t>(layer)];
  }
  const std::vector<DecoderLayer>& layers() const { return layers_; }
  // Most floats any block needs for `rows` rows.
  int64_t scratch_floats(int64_t rows) const;

  // Row of the embedding table for `token`, scaled, into out[hidden].
  void embed(TokenId token, float* out) const;
  // logits[rows, vocab] of x[rows, hidden]; scratch: rows * hidden.
  void head(const float* x, int64_t rows, float* logits, float* scratch, ThreadPool& pool) const;

 private:
  Decoder() = default;
  void link();
  model::DecoderSpec spec_;
  quant::KvFormat kv_format_;
  std::vector<quant::KvPageLayout> layouts_;  // per layer
  std::vector<float> inv_freq_;
  std::optional<Linear> embedding_, head_;
  std::optional<Norm> final_norm_;
  std::vector<DecoderLayer> layers_;
};

// Inverse frequencies of the rotary table, float32 [dims/2], scaling applied.
std::vector<float> rope_inv_freq(const model::RopeSpec& spec);

}  // namespace fq::blocks
