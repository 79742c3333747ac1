// Scalar references of the attention ops. A token's K and V come as factors (quant/kv_format.h):
// x_k, x_v, exact code minus zero, and the scales of their groups; float formats have one group of
// scale 1. The order of operations of one (row, head), which every kernel keeps:
//
//   for each chunk of 512 tokens, ascending, from m = -infinity, l = 0, o = 0:
//     for each block of 64 tokens (a page), ascending, with n visible tokens in it:
//       dot[g] = sum over dims of the group ascending of fma(q, x_k, sum)       for t in [0, n)
//       s[t]   = f * (dot[0] * k_scale[0], then fma(dot[g], k_scale[g], sum))
//       m'     = max(m, s[0..n)),  c = exp(m - m')
//       l[i]   = l[i] * c for the 16 partial sums,  o[d] = o[d] * c
//       p[t]   = exp(s[t] - m'),  l[t % 16] += p[t] in token order
//       w[t]   = p[t] * v_scale[group of d]
//       o[d]   = fma(w[t], x_v[t][d], o[d]) in token order
//     merged into M, L, O, which start likewise:  M' = max(M, m), a = exp(M - M'), b = exp(m - M'),
//       L[i] = fma(l[i], b, L[i] * a),  O[d] = fma(o[d], b, O[d] * a)
//   out[d] = O[d] * (1 / sum of L) + 0   (+ 0 turns -0 into +0, so that skipped and zero terms are
//                                         the same)
//
// f is the softmax's scale. Where K or V has codes its products are integers, unless `exact` is
// asked for, and what it meets is rounded to about 16 bits first (ops/kv_codes.h):
//
//   q' = round(q * (Q / max|q|)),  dot[g] = sum of q' x_k, exact,  f = scale * (max|q| / Q)
//   w' = round(w * (W / max w)) of the block's visible tokens
//   o[d] = fma(sum of w' x_v[t][d], max w / W, o[d]),  the sum exact
//
// So a row's result depends on its own visible tokens only, however rows are tiled, and chunks may
// be computed on different threads. Owns nothing; any thread.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "src/ops/kv_codes.h"
#include "src/ops/math.h"
#include "src/ops/ops.h"

namespace fq::ops {
namespace {

constexpr int kBlock = quant::kPageTokens;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// K or V of a block of tokens: factors [kBlock, dims] and scales [kBlock, groups].
struct BlockPart {
  int dims, group, groups;
  bool codes;
  std::vector<float> x, scales;

  BlockPart(int dim_count, int group_dims, bool has_codes)
      : dims(dim_count),
        group(group_dims),
        groups(dim_count / group_dims),
        codes(has_codes),
        x(static_cast<size_t>(kBlock) * dim_count),
        scales(static_cast<size_t>(kBlock) * groups, 1.0f) {}
  float* row(int t) { return x.data() + static_cast<size_t>(t) * dims; }
  float* scale(int t) { return scales.data() + static_cast<size_t>(t) * groups; }
  const float* row(int t) const { return x.data() + static_cast<size_t>(t) * dims; }
  const float* scale(int t) const { return scales.data() + static_cast<size_t>(t) * groups; }
};

// A row of queries of one head, as the format of K wants it.
class Query {
 public:
  Query(const float* q, const BlockPart& k, float scale) : q_(q, q + k.dims), factor_(scale) {
    if (!k.codes) return;
    float largest = 0.0f;
    bool finite = true;
    for (const float value : q_) {
      largest = std::max(largest, std::fabs(value));
      finite = finite && std::isfinite(value);
    }
    const QueryScale s = query_scale(largest, finite, k.group);
    for (float& value : q_) value = finite ? std::nearbyint(value * s.to_codes) : 0.0f;
    factor_ = scale * s.step;
  }

  float score(const BlockPart& k, int t) const {
    float sum = 0.0f;
    for (int g = 0; g < k.groups; ++g) {
      const float dot = k.codes ? exact_dot(k, t, g) : float_dot(k, t, g);
      sum = g == 0 ? dot * k.scale(t)[0] : std::fma(dot, k.scale(t)[g], sum);
    }
    return sum * factor_;
  }

 private:
  float float_dot(const BlockPart& k, int t, int g) const {
    float dot = 0.0f;
    for (int d = g * k.group; d < (g + 1) * k.group; ++d)
      dot = std::fma(q_[static_cast<size_t>(d)], k.row(t)[d], dot);
    return dot;
  }
  float exact_dot(const BlockPart& k, int t, int g) const {
    int64_t dot = 0;
    for (int d = g * k.group; d < (g + 1) * k.group; ++d)
      dot += static_cast<int64_t>(q_[static_cast<size_t>(d)]) * static_cast<int64_t>(k.row(t)[d]);
    return static_cast<float>(dot);
  }

  std::vector<float> q_;
  float factor_;
};

// Running softmax of one (row, head).
class OnlineSoftmax {
 public:
  OnlineSoftmax(const Query& query, int head_dim)
      : query_(query), out_(static_cast<size_t>(head_dim)) {}

  // The first n tokens of a block.
  void add_block(const BlockPart& k, const BlockPart& v, int n) {
    float p[kBlock];
    float most = max_;
    for (int t = 0; t < n; ++t) {
      p[t] = query_.score(k, t);
      most = std::max(most, p[t]);
    }
    const float rescale = exp_f32(max_ - most);
    max_ = most;
    for (float& lane : lanes_) lane *= rescale;
    for (float& value : out_) value *= rescale;
    for (int t = 0; t < n; ++t) {
      p[t] = exp_f32(p[t] - max_);
      lanes_[t % kSumLanes] += p[t];
    }
    for (int g = 0; g < v.groups; ++g) {
      float weights[kBlock];
      for (int t = 0; t < n; ++t) weights[t] = p[t] * v.scale(t)[g];
      for (int d = g * v.group; d < (g + 1) * v.group; ++d)
        out_[static_cast<size_t>(d)] =
            v.codes ? exact_value(weights, v, n, d) : float_value(weights, v, n, d);
    }
  }

  void merge(const OnlineSoftmax& part) {
    const float most = std::max(max_, part.max_);
    const float a = exp_f32(max_ - most), b = exp_f32(part.max_ - most);
    max_ = most;
    for (int i = 0; i < kSumLanes; ++i) lanes_[i] = std::fma(part.lanes_[i], b, lanes_[i] * a);
    for (size_t d = 0; d < out_.size(); ++d) out_[d] = std::fma(part.out_[d], b, out_[d] * a);
  }

  void finish(float* out) {
    const float inverse = 1.0f / add_lanes(lanes_);
    for (size_t d = 0; d < out_.size(); ++d) out[d] = out_[d] * inverse + 0.0f;
  }

 private:
  float float_value(const float* weights, const BlockPart& v, int n, int d) const {
    float sum = out_[static_cast<size_t>(d)];
    for (int t = 0; t < n; ++t) sum = std::fma(weights[t], v.row(t)[d], sum);
    return sum;
  }
  float exact_value(const float* weights, const BlockPart& v, int n, int d) const {
    const WeightScale s = weight_scale(*std::max_element(weights, weights + n));
    int64_t sum = 0;
    for (int t = 0; t < n; ++t) {
      const float code = std::nearbyint(weights[t] * s.to_codes);
      sum += (code == code ? static_cast<int64_t>(code) : 0) * static_cast<int64_t>(v.row(t)[d]);
    }
    return std::fma(static_cast<float>(sum), s.step, out_[static_cast<size_t>(d)]);
  }

  const Query& query_;
  float max_ = kLowest;
  float lanes_[kSumLanes] = {};
  std::vector<float> out_;
};

// The first `tokens` tokens of one head of one page.
void read_page(const KvView& kv, const quant::KvPart& part, int64_t page, int head, int tokens,
               BlockPart* block) {
  for (int t = 0; t < tokens; ++t) {
    quant::kv_read_factors(*kv.layout, part, kv.pages[page], t, head, block->row(t),
                           block->scale(t));
  }
}

}  // namespace

void attention_reference(const AttentionArgs& args) {
  const quant::KvPageLayout& layout = *args.kv.layout;
  const int dims = layout.head_dim;
  const int per_kv = args.heads / layout.kv_heads;
  BlockPart k(dims, layout.k.group, layout.k.has_codes() && !args.exact);
  BlockPart v(dims, layout.v.group, layout.v.has_codes() && !args.exact);
  for (int head = 0; head < args.heads; ++head) {
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t at = int64_t{head} * dims;
      const Query query(args.q + row * args.q_stride + at, k, args.scale);
      OnlineSoftmax total(query, dims);
      const int64_t visible = args.begin + row + 1;
      for (int64_t chunk = 0; chunk < visible; chunk += kAttentionChunk) {
        OnlineSoftmax softmax(query, dims);
        const int64_t end = std::min(visible, chunk + kAttentionChunk);
        for (int64_t begin = chunk; begin < end; begin += kBlock) {
          const int n = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
          read_page(args.kv, layout.k, begin / kBlock, head / per_kv, n, &k);
          read_page(args.kv, layout.v, begin / kBlock, head / per_kv, n, &v);
          softmax.add_block(k, v, n);
        }
        total.merge(softmax);
      }
      total.finish(args.out + row * args.out_stride + at);
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
  BlockPart k(dims, layout.k.group, layout.k.has_codes() && !args.exact);
  std::vector<float> scores(static_cast<size_t>(length)), part(scores.size());
  std::fill_n(args.out, length, 0.0f);
  for (int kv_head = 0; kv_head < layout.kv_heads; ++kv_head) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int head = kv_head * per_kv; head < (kv_head + 1) * per_kv; ++head) {
      for (int query = 0; query < args.queries; ++query) {
        const Query q(args.q + query * args.q_stride + int64_t{head} * dims, k, args.scale);
        const int64_t visible = length - args.queries + query + 1;
        float most = kLowest;
        for (int64_t t = 0; t < visible; ++t) {
          quant::kv_read_factors(layout, layout.k, args.kv.pages[t / kBlock],
                                 static_cast<int>(t % kBlock), kv_head, k.row(0), k.scale(0));
          scores[static_cast<size_t>(t)] = q.score(k, 0);
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
  BlockPart k(dims, dims, false), v(dims, dims, false);
  for (int64_t block = 0; block < args.blocks; ++block) {
    for (int head = 0; head < args.heads; ++head) {
      const int64_t base = block * args.tokens * args.stride + int64_t{head} * dims;
      for (int64_t row = 0; row < args.tokens; ++row) {
        const Query query(args.q + base + row * args.stride, k, args.scale);
        OnlineSoftmax softmax(query, dims);
        for (int64_t begin = 0; begin < args.tokens; begin += kBlock) {
          const int n = static_cast<int>(std::min<int64_t>(kBlock, args.tokens - begin));
          for (int t = 0; t < n; ++t) {
            const int64_t at = base + (begin + t) * args.stride;
            std::copy_n(args.k + at, dims, k.row(t));
            std::copy_n(args.v + at, dims, v.row(t));
          }
          softmax.add_block(k, v, n);
        }
        softmax.finish(args.out + base + row * args.stride);
      }
    }
  }
}

}  // namespace fq::ops
