#include "src/blocks/decoder.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace fq::blocks {

std::vector<float> rope_inv_freq(const model::RopeSpec& spec) {
  std::vector<float> inv(static_cast<size_t>(spec.dims / 2));
  for (size_t i = 0; i < inv.size(); ++i) {
    // Float32 steps as the published models take them; positions are small enough for the rounding
    // to matter at most in the last bit of the angle.
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(spec.dims);
    const float freq = 1.0f / std::pow(static_cast<float>(spec.base), exponent);
    inv[i] = freq;
    if (spec.scaling == model::RopeScaling::kLinear) {
      inv[i] = freq / static_cast<float>(spec.factor);
    } else if (spec.scaling == model::RopeScaling::kLlama3) {
      // Long wavelengths are stretched by `factor`, short ones kept, those between blended.
      const double wavelength = 2.0 * std::numbers::pi / freq;
      const double low = spec.original_context / spec.low_freq_factor;
      const double high = spec.original_context / spec.high_freq_factor;
      if (wavelength > low) {
        inv[i] = static_cast<float>(freq / spec.factor);
      } else if (wavelength >= high) {
        const double smooth = (spec.original_context / wavelength - spec.low_freq_factor) /
                              (spec.high_freq_factor - spec.low_freq_factor);
        inv[i] = static_cast<float>((1.0 - smooth) * freq / spec.factor + smooth * freq);
      }
    }
  }
  return inv;
}

Result<std::unique_ptr<const Decoder>> Decoder::bind(const Binder& binder, quant::KvFormat kv) {
  auto decoder = std::unique_ptr<Decoder>(new Decoder());
  decoder->spec_ = binder.directory.spec().decoder;
  const model::DecoderSpec& spec = decoder->spec_;
  decoder->kv_format_ = kv;
  for (int i = 0; i < spec.layers; ++i) {
    FQ_ASSIGN_OR_RETURN(
        auto layout, quant::KvPageLayout::make(kv.of_layer(i, spec.layers), spec.attention.kv_heads,
                                               spec.attention.head_dim));
    decoder->layouts_.push_back(layout);
  }
  decoder->inv_freq_ = rope_inv_freq(spec.rope);
  FQ_ASSIGN_OR_RETURN(decoder->embedding_, Linear::bind(binder, "decoder.embedding", false));
  if (!spec.tied_embedding) {
    FQ_ASSIGN_OR_RETURN(decoder->head_, Linear::bind(binder, "decoder.head", false));
  }
  FQ_ASSIGN_OR_RETURN(decoder->final_norm_,
                      Norm::bind(binder, "decoder.final_norm", spec.norm, spec.hidden));
  decoder->layers_.reserve(static_cast<size_t>(spec.layers));
  for (int i = 0; i < spec.layers; ++i) {
    const std::string prefix = "decoder.layers." + std::to_string(i);
    FQ_ASSIGN_OR_RETURN(auto attention,
                        DecoderAttention::bind(binder, prefix, spec, decoder->kv_layout(i),
                                               decoder->inv_freq_.data()));
    FQ_ASSIGN_OR_RETURN(auto mlp, Mlp::bind(binder, prefix, spec.mlp, spec.norm, spec.hidden));
    decoder->layers_.push_back({std::move(attention), std::move(mlp)});
  }
  decoder->link();
  return std::unique_ptr<const Decoder>(std::move(decoder));
}

// Every linear learns what follows it: in a step of decoding, the first layer follows the head.
void Decoder::link() {
  Linear& head = head_ ? *head_ : *embedding_;
  for (size_t i = 0; i < layers_.size(); ++i) {
    layers_[i].attention.lead_to(layers_[i].mlp.first_call());
    layers_[i].mlp.lead_to(i + 1 < layers_.size() ? layers_[i + 1].attention.first_call()
                                                  : LinearCall{{&head}});
  }
  head.lead_to(layers_.front().attention.first_call());
}

int64_t Decoder::scratch_floats(int64_t rows) const {
  const DecoderLayer& layer = layers_.front();
  return std::max(
      {layer.attention.scratch_floats(rows), layer.mlp.scratch_floats(rows), rows * spec_.hidden});
}

void Decoder::embed(TokenId token, float* out) const {
  quant::dequantize_row(embedding_->weights(), token, out);
  if (spec_.embedding_scale != 1.0f) {
    for (int i = 0; i < spec_.hidden; ++i) out[i] *= spec_.embedding_scale;
  }
}

void Decoder::head(const float* x, int64_t rows, float* logits, float* scratch,
                   ThreadPool& pool) const {
  final_norm_->run(x, scratch, rows, pool);
  const Linear& head = head_ ? *head_ : *embedding_;
  head.run(scratch, spec_.hidden, rows, logits, spec_.vocab, false, pool);
}

}  // namespace fq::blocks
