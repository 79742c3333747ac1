// Scalar references of the attention ops. The order of operations of one (row, head), which every
// kernel keeps:
//
//   for each block of 64 tokens (a page), ascending, with n visible tokens in it:
//     s[t]   = scale * sum over dims ascending of fma(q, k, sum)                   for t in [0, n)
//     m'     = max(m, s[0..n)),  c = exp(m - m')                                     (m starts at
//     -infinity) l[i]   = l[i] * c for the 16 partial sums,  out[d] = out[d] * c p[t]   = exp(s[t]
//     - m'),  l[t % 16] += p[t] in token order out[d] = fma(p[t], v[t][d], out[d]) in token order
//   out[d] = out[d] * (1 / sum of l) + 0      (+ 0 turns -0 into +0, so that skipped and zero terms
//   are the same)
//
// So a row's result depends on its own visible tokens only, however rows are tiled. Owns nothing;
// any thread.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "src/ops/math.h"
#include "src/ops/ops.h"

namespace fq::ops {
namespace {

constexpr int kBlock = quant::kPageTokens;

// Running softmax of one (row, head).
class OnlineSoftmax {
 public:
  OnlineSoftmax(const float* q, int head_dim, float scale)
      : q_(q), scale_(scale), out_(static_cast<size_t>(head_dim)) {}

  // n tokens of k and v [n, head_dim].
  void add_block(const float* k, const float* v, int n) {
    const size_t dims = out_.size();
    float scores[kBlock];
    float most = max_;
    for (int t = 0; t < n; ++t) {
      float sum = 0.0f;
      for (size_t d = 0; d < dims; ++d) sum = std::fma(q_[d], k[t * dims + d], sum);
      scores[t] = sum * scale_;
      most = std::max(most, scores[t]);
    }
    const float rescale = exp_f32(max_ - most);
    max_ = most;
    for (float& lane : lanes_) lane *= rescale;
    for (float& value : out_) value *= rescale;
    for (int t = 0; t < n; ++t) {
      const float p = exp_f32(scores[t] - max_);
      lanes_[t % kSumLanes] += p;
      for (size_t d = 0; d < dims; ++d) out_[d] = std::fma(p, v[t * dims + d], out_[d]);
    }
  }

  void finish(float* out) {
    const float inverse = 1.0f / add_lanes(lanes_);
    for (size_t d = 0; d < out_.size(); ++d) out[d] = out_[d] * inverse + 0.0f;
  }

 private:
  const float* q_;
  float scale_;
  float max_ = -std::numeric_limits<float>::infinity();
  float lanes_[kSumLanes] = {};
  std::vector<float> out_;
};

// One head of one page as float32 [tokens, head_dim].
void read_page(const KvView& kv, int64_t page, int head, int tokens, float* k, float* v) {
  const size_t dims = static_cast<size_t>(kv.layout->head_dim);
  for (int t = 0; t < tokens; ++t) {
    const size_t at = static_cast<size_t>(t) * dims;
    quant::kv_read_reference(*kv.layout, kv.pages[page], t, head, k + at, v + at);
  }
}

}  // namespace

void attention_reference(const AttentionArgs& args) {
  const quant::KvPageLayout& layout = *args.kv.layout;
  const int dims = layout.head_dim;
  const int per_kv = args.heads / layout.kv_heads;
  std::vector<float> k(static_cast<size_t>(kBlock) * dims), v(k.size());
  for (int head = 0; head < args.heads; ++head) {
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t at = int64_t{head} * dims;
      OnlineSoftmax softmax(args.q + row * args.q_stride + at, dims, args.scale);
      const int64_t visible = args.begin + row + 1;
      for (int64_t page = 0; page * kBlock < visible; ++page) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, visible - page * kBlock));
        read_page(args.kv, page, head / per_kv, n, k.data(), v.data());
        softmax.add_block(k.data(), v.data(), n);
      }
      softmax.finish(args.out + row * args.out_stride + at);
    }
  }
}

// Order per token: the heads of a kv head and their queries ascending (queries inside), then the kv
// heads.
void importance_reference(const ImportanceArgs& args) {
  const quant::KvPageLayout& layout = *args.kv.layout;
  const int dims = layout.head_dim;
  const int per_kv = args.heads / layout.kv_heads;
  const int64_t length = args.kv.length;
  std::vector<float> k(static_cast<size_t>(kBlock) * dims), v(k.size());
  std::vector<float> scores(static_cast<size_t>(length)), part(scores.size());
  std::fill_n(args.out, length, 0.0f);
  for (int kv_head = 0; kv_head < layout.kv_heads; ++kv_head) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int head = kv_head * per_kv; head < (kv_head + 1) * per_kv; ++head) {
      for (int query = 0; query < args.queries; ++query) {
        const float* const q = args.q + query * args.q_stride + int64_t{head} * dims;
        const int64_t visible = length - args.queries + query + 1;
        float most = -std::numeric_limits<float>::infinity();
        for (int64_t t = 0; t < visible; ++t) {
          quant::kv_read_reference(layout, args.kv.pages[t / kBlock], static_cast<int>(t % kBlock),
                                   kv_head, k.data(), v.data());
          float sum = 0.0f;
          for (int d = 0; d < dims; ++d) sum = std::fma(q[d], k[static_cast<size_t>(d)], sum);
          scores[static_cast<size_t>(t)] = sum * args.scale;
          most = std::max(most, scores[static_cast<size_t>(t)]);
        }
        float lanes[kSumLanes] = {};
        for (int64_t t = 0; t < visible; ++t) {
          float& s = scores[static_cast<size_t>(t)];
          s = exp_f32(s - most);
          lanes[t % kSumLanes] += s;
        }
        const float inverse = 1.0f / add_lanes(lanes);
        for (int64_t t = 0; t < visible; ++t) {
          part[static_cast<size_t>(t)] += scores[static_cast<size_t>(t)] * inverse;
        }
      }
    }
    for (int64_t t = 0; t < length; ++t) args.out[t] += part[static_cast<size_t>(t)];
  }
  const float mean = 1.0f / static_cast<float>(args.heads * args.queries);
  for (int64_t t = 0; t < length; ++t) args.out[t] *= mean;
}

void encoder_attention_reference(const EncoderAttentionArgs& args) {
  const int dims = args.head_dim;
  std::vector<float> k(static_cast<size_t>(kBlock) * dims), v(k.size());
  for (int64_t block = 0; block < args.blocks; ++block) {
    for (int head = 0; head < args.heads; ++head) {
      const int64_t base = block * args.tokens * args.stride + int64_t{head} * dims;
      for (int64_t row = 0; row < args.tokens; ++row) {
        OnlineSoftmax softmax(args.q + base + row * args.stride, dims, args.scale);
        for (int64_t begin = 0; begin < args.tokens; begin += kBlock) {
          const int n = static_cast<int>(std::min<int64_t>(kBlock, args.tokens - begin));
          for (int t = 0; t < n; ++t) {
            const int64_t at = base + (begin + t) * args.stride;
            std::copy_n(args.k + at, dims, k.begin() + static_cast<ptrdiff_t>(t) * dims);
            std::copy_n(args.v + at, dims, v.begin() + static_cast<ptrdiff_t>(t) * dims);
          }
          softmax.add_block(k.data(), v.data(), n);
        }
        softmax.finish(args.out + base + row * args.stride);
      }
    }
  }
}

}  // namespace fq::ops
