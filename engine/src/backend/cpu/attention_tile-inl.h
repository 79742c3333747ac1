// A tile of query rows and its running softmax, the order of operations of ops/attention.cc: scores
// of a block of at most 64 tokens, softmax of every row, weighted values. Shared by the attention
// kernels. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_ATTENTION_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_ATTENTION_TILE_INL_H_
#undef FRAMEQUILT_CPU_ATTENTION_TILE_INL_H_
#else
#define FRAMEQUILT_CPU_ATTENTION_TILE_INL_H_
#endif

#include <algorithm>
#include <limits>

#include "hwy/highway.h"
#include "src/backend/cpu/math-inl.h"
#include "src/backend/cpu/pages-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

constexpr int64_t kBlock = kPageTokens;
constexpr float kLowestScore = -std::numeric_limits<float>::infinity();

// --- Softmax of one row ----------------------------------------------------------------------

// scores[0, n) times scale, in place; the largest of them and `most`. Lanes past n become -infinity
// up to a whole vector.
HWY_INLINE float ScaleAndMax(float* scores, int64_t n, float scale, float most) {
  const DF df;
  const VF factor = hn::Set(df, scale);
  const VF lowest = hn::Set(df, kLowestScore);
  VF highest = hn::Set(df, most);
  for (int64_t t = 0; t < n; t += kLanes) {
    VF s = hn::Mul(hn::Load(df, scores + t), factor);
    if (t + kLanes > n) s = hn::IfThenElse(hn::FirstN(df, static_cast<size_t>(n - t)), s, lowest);
    hn::Store(s, df, scores + t);
    highest = hn::Max(highest, s);
  }
  return hn::GetLane(hn::MaxOfLanes(df, highest));
}

// scores[0, n) become exp(score - most) and are added to the 16 sums; -infinity becomes 0. n is a
// multiple of kLanes.
HWY_INLINE void ExpAndSum(float* scores, int64_t n, float most, LaneSums& sums) {
  const DF df;
  const VF shift = hn::Set(df, most);
  for (int64_t t = 0; t < n; t += kSumLanes) {
    Unrolled<LaneSums::kParts>([&](auto part) FRAMEQUILT_INLINE {
      const int64_t at = t + part * kLanes;
      if (at < n) {
        const VF p = Exp<true>(hn::Sub(hn::Load(df, scores + at), shift));
        hn::Store(p, df, scores + at);
        sums.parts[part] = hn::Add(sums.parts[part], p);
      }
    });
  }
}

// --- State -----------------------------------------------------------------------------------

// Running softmax of the rows of a tile, in memory of the caller's.
struct SoftmaxState {
  float* out = nullptr;  // [rows, out_stride]
  float* lanes = nullptr;
  float* most = nullptr;
  int64_t out_stride = 0;  // head_dim rounded up to kLanes

  static int64_t Floats(int64_t rows, int64_t out_stride) {
    return RoundUp(rows * (out_stride + kSumLanes + 1), kSumLanes);
  }
  SoftmaxState(float* memory, int64_t rows, int64_t stride)
      : out(memory),
        lanes(memory + rows * stride),
        most(lanes + rows * kSumLanes),
        out_stride(stride) {}

  void Reset(int64_t first, int64_t rows) const {
    std::fill(out + first * out_stride, out + rows * out_stride, 0.0f);
    std::fill(lanes + first * kSumLanes, lanes + rows * kSumLanes, 0.0f);
    std::fill(most + first, most + rows, kLowestScore);
  }

  // One block for one row: n visible tokens of `tokens` (a multiple of kLanes); probabilities of
  // the others are 0.
  HWY_INLINE void AddScores(int64_t row, float* scores, int64_t n, int64_t tokens,
                            float scale) const {
    const DF df;
    const float old_most = most[row];
    const float new_most = ScaleAndMax(scores, n, scale, old_most);
    most[row] = new_most;
    float* const row_lanes = lanes + row * kSumLanes;
    const VF rescale = Exp<true>(hn::Set(df, old_most - new_most));
    LaneSums sums;
    Unrolled<LaneSums::kParts>([&](auto i) FRAMEQUILT_INLINE {
      sums.parts[i] = hn::Mul(hn::Load(df, row_lanes + i * kLanes), rescale);
    });
    const int64_t whole = RoundUp(n, kLanes);
    ExpAndSum(scores, whole, new_most, sums);
    sums.Store(row_lanes);
    for (int64_t t = whole; t < tokens; t += kLanes) hn::Store(hn::Zero(df), df, scores + t);
    if (old_most == new_most) return;  // rescale is exactly 1
    float* const row_out = out + row * out_stride;
    for (int64_t d = 0; d < out_stride; d += kLanes)
      hn::Store(hn::Mul(hn::Load(df, row_out + d), rescale), df, row_out + d);
  }

  // Merges row `from` of the next chunk into row `row` of this one.
  HWY_INLINE void Merge(int64_t row, const SoftmaxState& part, int64_t from) const {
    const DF df;
    const float new_most = std::max(most[row], part.most[from]);
    const VF a = Exp<true>(hn::Set(df, most[row] - new_most));
    const VF b = Exp<true>(hn::Set(df, part.most[from] - new_most));
    most[row] = new_most;
    const auto merge = [&](float* to, const float* add, int64_t count) FRAMEQUILT_INLINE {
      for (int64_t i = 0; i < count; i += kLanes) {
        const VF kept = hn::Mul(hn::Load(df, to + i), a);
        hn::Store(hn::MulAdd(hn::Load(df, add + i), b, kept), df, to + i);
      }
    };
    merge(lanes + row * kSumLanes, part.lanes + from * kSumLanes, kSumLanes);
    merge(out + row * out_stride, part.out + from * out_stride, out_stride);
  }

  void Finish(int64_t row, int64_t head_dim, float* to) const {
    const float inverse = 1.0f / ops::add_lanes(lanes + row * kSumLanes);
    const float* const sums = out + row * out_stride;
    for (int64_t d = 0; d < head_dim; ++d) to[d] = sums[d] * inverse + 0.0f;
  }
};

// Inner products of a tile's rows with a panel.
HWY_INLINE void PanelScores(const float* q, int64_t q_stride, int64_t rows, int64_t dims,
                            const Panel& k, int64_t tokens, float* scores, int64_t stride) {
  GemmBlock g;
  g.a = q;
  g.a_stride = q_stride;
  g.b = k.data;
  g.b_stride = k.stride;
  g.c = scores;
  g.c_stride = stride;
  g.k = dims;
  g.first = true;
  Gemm(g, rows, tokens);
}

HWY_INLINE void PanelValues(const float* weights, int64_t rows, int64_t tokens, const Panel& v,
                            int64_t columns, float* out, int64_t out_stride) {
  GemmBlock g;
  g.a = weights;
  g.a_stride = kBlock;
  g.b = v.data;
  g.b_stride = v.stride;
  g.c = out;
  g.c_stride = out_stride;
  g.k = tokens;
  g.first = false;
  Gemm(g, rows, columns);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
