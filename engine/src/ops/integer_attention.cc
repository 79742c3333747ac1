// Scalar reference of encoder attention with 8-bit queries and keys. Of one head of one block:
//
//   mean[d] = (sum over tokens ascending of k[t][d]) / tokens
//   q[t], k[t] - mean: 8-bit codes, a scale per token (quant/activations.h, symmetric)
//   v[t][d]: codes in [-1023, 1023], a scale per d
//   s[t]   = (sum over d of q code * k code) * k_scale[t],  m = max(s)
//   p[t]   = probability_code((s[t] - m) * (q_scale * scale * log2 e)),  l = sum of p
//   o[d]   = for each span of 256 tokens, ascending: o[d] + float(sum over its tokens of p[t] *
//   code) out[d] = o[d] * v_scale[d] * (1 / l)
//
// The mean of the keys moves all scores of a query alike, which a softmax does not see; without it
// their codes would be spent on what all tokens have in common. Sums of codes are exact, so a row
// depends neither on how rows are tiled nor on how tokens are. Owns nothing; any thread.
#include "src/ops/integer_attention.h"

#include <limits>
#include <vector>

#include "src/ops/ops.h"
#include "src/quant/activations.h"
#include "src/quant/number.h"

namespace fq::ops {
namespace {

constexpr model::ActivationFormat kCodes{.bits = 8, .symmetric = true};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A head's keys and values.
class Head {
 public:
  Head(const float* k, const float* v, int64_t stride, int64_t tokens, int dims)
      : tokens_(tokens),
        dims_(dims),
        k_codes_(static_cast<size_t>(tokens * dims)),
        k_scales_(static_cast<size_t>(tokens)),
        v_codes_(k_codes_.size()),
        v_scales_(static_cast<size_t>(dims)) {
    read_keys(k, stride);
    read_values(v, stride);
  }

  void attend(const float* q, float scale, float* out) const {
    std::vector<int8_t> codes(static_cast<size_t>(dims_));
    const quant::QuantizedRow row = quant::quantize_row(q, dims_, kCodes, codes.data());
    if (!finite_ || !std::isfinite(row.scale)) {
      std::fill_n(out, dims_, kNan);
      return;
    }
    std::vector<float> scores(static_cast<size_t>(tokens_));
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t t = 0; t < tokens_; ++t) {
      int32_t dot = 0;
      for (int d = 0; d < dims_; ++d)
        dot += codes[static_cast<size_t>(d)] * k_codes_[static_cast<size_t>(t * dims_ + d)];
      const float s = static_cast<float>(dot) * k_scales_[static_cast<size_t>(t)];
      scores[static_cast<size_t>(t)] = s;
      most = std::max(most, s);
    }
    const float factor = row.scale * scale * MathConstants::kLog2E;
    std::vector<int32_t> p(scores.size());
    int32_t total = 0;
    for (size_t t = 0; t < p.size(); ++t)
      total += p[t] = probability_code((scores[t] - most) * factor);
    const float inverse = 1.0f / static_cast<float>(total);
    for (int d = 0; d < dims_; ++d) {
      float sum = 0.0f;
      for (int64_t begin = 0; begin < tokens_; begin += IntegerAttention::kValueSpan) {
        int32_t part = 0;
        const int64_t end = std::min<int64_t>(tokens_, begin + IntegerAttention::kValueSpan);
        for (int64_t t = begin; t < end; ++t)
          part += p[static_cast<size_t>(t)] * v_codes_[static_cast<size_t>(t * dims_ + d)];
        sum += static_cast<float>(part);
      }
      out[d] = sum * v_scales_[static_cast<size_t>(d)] * inverse;
    }
  }

 private:
  void read_keys(const float* k, int64_t stride) {
    std::vector<float> mean(static_cast<size_t>(dims_), 0.0f), row(mean.size());
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int d = 0; d < dims_; ++d) mean[static_cast<size_t>(d)] += k[t * stride + d];
    }
    for (float& sum : mean) sum /= static_cast<float>(tokens_);
    for (int64_t t = 0; t < tokens_; ++t) {
      for (size_t d = 0; d < row.size(); ++d)
        row[d] = k[t * stride + static_cast<int64_t>(d)] - mean[d];
      float& scale = k_scales_[static_cast<size_t>(t)];
      scale = quant::quantize_row(row.data(), dims_, kCodes, k_codes_.data() + t * dims_).scale;
      finite_ = finite_ && std::isfinite(scale);
    }
  }

  void read_values(const float* v, int64_t stride) {
    constexpr float kMost = IntegerAttention::kValueMost;
    for (int d = 0; d < dims_; ++d) {
      float most = 0.0f;
      for (int64_t t = 0; t < tokens_; ++t) {
        most = std::max(most, std::fabs(v[t * stride + d]));
        finite_ = finite_ && std::isfinite(v[t * stride + d]);
      }
      const float scale = std::max(most, 1e-5f) / kMost;
      v_scales_[static_cast<size_t>(d)] = scale;
      for (int64_t t = 0; finite_ && t < tokens_; ++t) {
        v_codes_[static_cast<size_t>(t * dims_ + d)] = static_cast<int16_t>(
            quant::clamped(std::nearbyint(v[t * stride + d] / scale), -kMost, kMost));
      }
    }
  }

  int64_t tokens_;
  int dims_;
  bool finite_ = true;
  std::vector<int8_t> k_codes_;
  std::vector<float> k_scales_;
  std::vector<int16_t> v_codes_;
  std::vector<float> v_scales_;
};

}  // namespace

void integer_encoder_attention_reference(const EncoderAttentionArgs& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    for (int head = 0; head < args.heads; ++head) {
      const int64_t base = block * args.tokens * args.stride + int64_t{head} * args.head_dim;
      const Head read(args.k + base, args.v + base, args.stride, args.tokens, args.head_dim);
      for (int64_t t = 0; t < args.tokens; ++t) {
        const int64_t at = base + t * args.stride;
        read.attend(args.q + at, args.scale, args.out + at);
      }
    }
  }
}

}  // namespace fq::ops
