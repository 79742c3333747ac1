// Full attention inside blocks of rows (frames of a vision tower): the online softmax of
// ops/attention.cc over blocks of 64 tokens, on a tile of query rows at once. As in the integer
// kernel, a vector holds the same thing of kLanes queries (scores of one token, one channel of the
// output): the softmax needs no sum or maximum across lanes, and tokens and channels are the rows
// that the products broadcast. Called by the engine thread, runs on the pool.
#include <algorithm>
#include <cstring>
#include <limits>

#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/encoder_attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/math-inl.h"
#include "src/backend/cpu/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

constexpr int64_t kBlockTokens = quant::kPageTokens;
constexpr int kMostVectors = 2;  // of queries in a tile
constexpr int64_t kMostQueries = kMostVectors * kLanes;
// Rows that are broadcast together lie this much further apart than they are long: a power of two
// would send them to few sets of the cache.
constexpr int64_t kRowGap = 16;

// One head of one block of rows.
struct FloatHead {
  const ops::EncoderAttentionArgs& args;
  EncoderAttentionScratch& s;
  int64_t base;  // of its first row in q, k, v and out
  int64_t tokens, dims;
  int64_t k_stride;
  static constexpr int64_t kValueStride = kBlockTokens + kRowGap;

  FloatHead(const ops::EncoderAttentionArgs& a, EncoderAttentionScratch& scratch, int64_t item)
      : args(a),
        s(scratch),
        base(item / a.heads * a.tokens * a.stride + item % a.heads * a.head_dim),
        tokens(a.tokens),
        dims(a.head_dim),
        k_stride((a.head_dim + 15) / 16 * 16 + kRowGap) {}

  void Reserve() const {
    const int64_t blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
    s.k_rows.reserve(static_cast<size_t>(tokens * k_stride));
    s.v_rows.reserve(static_cast<size_t>(blocks * dims * kValueStride));
    s.q_panel.reserve(static_cast<size_t>(dims * kMostQueries));
    s.scores.reserve(static_cast<size_t>(kBlockTokens * kMostQueries));
    s.out.reserve(static_cast<size_t>(dims * kMostQueries));
  }

  // K [tokens][dims]; V [blocks of tokens][dims][64].
  void ReadKeysAndValues() const {
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(s.k_rows.data() + t * k_stride, args.k + Place(t),
                  static_cast<size_t>(dims) * sizeof(float));
    }
    for (int64_t t = 0; t < tokens; t += kBlockTokens) {
      Transpose(args.v + Place(t), args.stride, std::min(kBlockTokens, tokens - t), dims, Values(t),
                kValueStride);
    }
  }
  int64_t Place(int64_t token) const { return base + token * args.stride; }
  float* Values(int64_t first_token) const {
    return s.v_rows.data() + first_token / kBlockTokens * dims * kValueStride;
  }
};

// A tile of kVectors vectors of queries, `rows` of them real.
template <int kVectors>
struct QueryTile {
  static constexpr int64_t kQueries = kVectors * kLanes;
  const FloatHead& head;
  const ops::EncoderAttentionArgs& args;
  EncoderAttentionScratch& s;
  int64_t row, rows, dims;
  HWY_ALIGN float most[kQueries];
  HWY_ALIGN float lanes[kSumLanes * kQueries];  // sums of the tokens t with the same t % 16

  QueryTile(const FloatHead& of, int64_t first, int64_t count)
      : head(of), args(of.args), s(of.s), row(first), rows(count), dims(of.dims) {
    std::fill_n(most, kQueries, -std::numeric_limits<float>::infinity());
    std::fill_n(lanes, kSumLanes * kQueries, 0.0f);
    std::fill_n(s.out.data(), dims * kQueries, 0.0f);
    ReadQueries();
  }

  // [dims][kQueries]; queries behind the last one are 0.
  void ReadQueries() const {
    float* const panel = s.q_panel.data();
    if (rows < kQueries) std::fill(panel, panel + dims * kQueries, 0.0f);
    Transpose(args.q + head.Place(row), args.stride, rows, dims, panel, kQueries);
  }

  // scores [count][kQueries] of the tokens from `begin` on.
  void Scores(int64_t begin, int64_t count) const {
    GemmBlock g;
    g.a = s.k_rows.data() + begin * head.k_stride;
    g.a_stride = head.k_stride;
    g.b = s.q_panel.data();
    g.c = s.scores.data();
    g.k = dims;
    g.b_stride = g.c_stride = kQueries;
    g.first = true;
    GemmPanel<kVectors>(g, count);
  }

  // Scores become exp(score - maximum); sums and outputs follow the maximum.
  void Softmax(int64_t count) {
    const DF df;
    float* const scores = s.scores.data();
    const VF factor = hn::Set(df, args.scale);
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      constexpr int64_t kAt = v * kLanes;
      const VF old_most = hn::Load(df, most + kAt);
      VF new_most = old_most;
      for (int64_t t = 0; t < count; ++t) {
        float* const at = scores + t * kQueries + kAt;
        const VF score = hn::Mul(hn::Load(df, at), factor);
        hn::Store(score, df, at);
        new_most = hn::Max(new_most, score);
      }
      hn::Store(new_most, df, most + kAt);
      const VF rescale = Exp<true>(hn::Sub(old_most, new_most));
      for (int64_t lane = 0; lane < kSumLanes; ++lane) {
        float* const lane_sum = lanes + lane * kQueries + kAt;
        VF sum = hn::Mul(hn::Load(df, lane_sum), rescale);
        for (int64_t t = lane; t < count; t += kSumLanes) {
          float* const at = scores + t * kQueries + kAt;
          const VF p = Exp<true>(hn::Sub(hn::Load(df, at), new_most));
          hn::Store(p, df, at);
          sum = hn::Add(sum, p);
        }
        hn::Store(sum, df, lane_sum);
      }
      if (hn::AllTrue(df, hn::Eq(rescale, hn::Set(df, 1.0f)))) return;
      for (int64_t d = 0; d < dims; ++d) {
        float* const at = s.out.data() + d * kQueries + kAt;
        hn::Store(hn::Mul(hn::Load(df, at), rescale), df, at);
      }
    });
  }

  // out [dims][kQueries] += weighted values of the tokens from `begin` on. With the last of them,
  // the rows of the output are asked for.
  void Values(int64_t begin, int64_t count, bool last) const {
    GemmBlock g;
    g.a = head.Values(begin);
    g.a_stride = FloatHead::kValueStride;
    g.b = s.scores.data();
    g.c = s.out.data();
    g.k = count;
    g.b_stride = g.c_stride = kQueries;
    GemmPanel<kVectors>(
        g, dims,
        [&](int64_t channel, int64_t channels) {
          if (last) AskForOutputs(rows * channel / dims, rows * (channel + channels) / dims);
        },
        [](int64_t, int64_t) {});
  }
  void AskForOutputs(int64_t first, int64_t end) const {
    for (int64_t r = first; r < end; ++r) {
      const float* const at = args.out + head.Place(row + r);
      for (int64_t d = 0; d < dims; d += 16) __builtin_prefetch(at + d, 1, 3);
    }
  }

  void Finish() const {
    const DF df;
    float* const out = s.out.data();
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      constexpr int64_t kAt = v * kLanes;
      VF sums[kSumLanes];
      Unrolled<kSumLanes>(
          [&](auto i) FRAMEQUILT_INLINE { sums[i] = hn::Load(df, lanes + i * kQueries + kAt); });
      for (int width = kSumLanes / 2; width > 0; width /= 2) {  // as ops::add_lanes
        for (int i = 0; i < width; ++i) sums[i] = hn::Add(sums[i], sums[i + width]);
      }
      const VF inverse = hn::Div(hn::Set(df, 1.0f), sums[0]);
      for (int64_t d = 0; d < dims; ++d) {
        float* const at = out + d * kQueries + kAt;
        hn::Store(hn::Add(hn::Mul(hn::Load(df, at), inverse), hn::Zero(df)), df, at);
      }
    });
    Transpose(out, kQueries, dims, rows, args.out + head.Place(row), args.stride);
  }

  void Run() {
    for (int64_t begin = 0; begin < args.tokens; begin += kBlockTokens) {
      const int64_t count = std::min(kBlockTokens, args.tokens - begin);
      Scores(begin, count);
      Softmax(count);
      Values(begin, count, begin + kBlockTokens >= args.tokens);
    }
    Finish();
  }
};

void RunHead(const FloatHead& head) {
  head.ReadKeysAndValues();
  for (int64_t row = 0; row < head.tokens; row += kMostQueries) {
    const int64_t rows = std::min(kMostQueries, head.tokens - row);
    if (rows > kLanes) {
      QueryTile<2>(head, row, rows).Run();
    } else {
      QueryTile<1>(head, row, rows).Run();
    }
  }
}

void EncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  std::vector<EncoderAttentionScratch>& scratch = encoder_attention_scratch(pool.threads());
  for (EncoderAttentionScratch& s : scratch) FloatHead(args, s, 0).Reserve();
  pool.parallel_for(args.blocks * args.heads, [&](int64_t item, int thread) {
    RunHead(FloatHead(args, scratch[static_cast<size_t>(thread)], item));
  });
}

#else  // one-lane targets: never chosen, see simd_targets()

void EncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  scalar_kernels().encoder_attention(args, pool);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(EncoderAttention);

void fill_encoder_attention_kernels(Kernels& kernels) {
  kernels.encoder_attention = &HWY_DYNAMIC_DISPATCH(EncoderAttention);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
