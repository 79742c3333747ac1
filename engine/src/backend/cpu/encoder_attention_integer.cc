// Encoder attention with 8-bit queries and keys: ops/integer_attention.cc on a tile of query rows
// at once. A vector holds the same thing of kLanes queries (scores of one token, one channel of the
// output), so that the softmax needs no sum or maximum across lanes and no head dimension wastes
// lanes; tokens and channels are broadcast. Called by the engine thread, runs on the pool.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#define FRAMEQUILT_WANT_VNNI 1
#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/ops/integer_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/encoder_attention_integer.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/amx_encoder-inl.h"
#include "src/backend/cpu/integer_inputs-inl.h"
#include "src/backend/cpu/pages-inl.h"
#include "src/backend/cpu/word_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

using Attention8 = ops::IntegerAttention;

constexpr int kTileVectors = 2;
constexpr int64_t kTileQueries = kTileVectors * kLanes;
constexpr int64_t kSpanPairs = Attention8::kValueSpan / 2;
constexpr model::ActivationFormat kCodeFormat{.bits = 8, .symmetric = true};

// What the parts of a head have in common.
struct Head {
  const ops::EncoderAttentionArgs& args;
  EncoderAttentionScratch& s;
  int64_t base;  // of its first row in q, k, v and out
  int64_t tokens, pairs, dims;
  int64_t stride;  // dims in whole vectors
  int64_t words;   // of the codes of a row

  Head(const ops::EncoderAttentionArgs& a, EncoderAttentionScratch& scratch, int64_t item)
      : args(a),
        s(scratch),
        base(item / a.heads * a.tokens * a.stride + item % a.heads * a.head_dim),
        tokens(a.tokens),
        pairs((a.tokens + 1) / 2),
        dims(a.head_dim),
        stride(RoundUp(a.head_dim, kLanes)),
        words((a.head_dim + kWordCodes - 1) / kWordCodes) {}

  void Reserve() const {
    const auto reserve = [](auto& buffer, int64_t count) {
      buffer.reserve(static_cast<size_t>(count));
    };
    reserve(s.rows, (tokens + 3) * stride);
    reserve(s.v_scales, stride);
#if FRAMEQUILT_HAVE_AMX
    reserve(s.v_codes, 4 * stride);
    return Codes().Reserve();
#endif
    reserve(s.k, tokens * words);
    reserve(s.k_scales, tokens);
    reserve(s.k_starts, tokens);
    reserve(s.v, pairs * dims);
    reserve(s.pair, stride);
    reserve(s.q, words * kTileQueries);
    reserve(s.codes, stride);
    reserve(s.scores, 2 * pairs * kTileQueries);
    reserve(s.out, dims * kTileQueries);
  }

#if FRAMEQUILT_HAVE_AMX
  EncoderTiles Codes() const { return EncoderTiles(s, tokens, dims); }
#endif

  // A row of the head, with zeros up to whole vectors.
  void Load(const float* from, int64_t row, float* to) const {
    std::memcpy(to, from + base + row * args.stride, static_cast<size_t>(dims) * sizeof(float));
    std::fill(to + dims, to + stride, 0.0f);
  }

  // --- Keys and values ---------------------------------------------------------------------------

  // False where a value is not finite.
  bool ReadKeys() const {
    const DF df;
    float* const mean = s.out.data();
    std::fill(mean, mean + stride, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      float* const row = s.rows.data() + t * stride;
      Load(args.k, t, row);
      for (int64_t d = 0; d < stride; d += kLanes)
        hn::Store(hn::Add(hn::Load(df, mean + d), hn::Load(df, row + d)), df, mean + d);
    }
    for (int64_t d = 0; d < stride; ++d) mean[d] /= static_cast<float>(tokens);
#if FRAMEQUILT_HAVE_AMX
    Codes().ClearKeys();
#endif
    bool finite = true;
    for (int64_t t = 0; t < tokens; ++t) {
      float* const row = s.rows.data() + t * stride;
      for (int64_t d = 0; d < stride; d += kLanes)
        hn::Store(hn::Sub(hn::Load(df, row + d), hn::Load(df, mean + d)), df, row + d);
      float sum = 0, zero = 0;
      QuantizeRow<false>(row, stride, stride, stride, kCodeFormat, s.codes.data(), &sum, nullptr,
                         {}, &s.k_scales[static_cast<size_t>(t)], &zero);
      finite = finite && std::isfinite(s.k_scales[static_cast<size_t>(t)]);
#if FRAMEQUILT_HAVE_AMX
      Codes().StoreKey(t, s.codes.data());
#else
      s.k_starts[static_cast<size_t>(t)] = WordStart(static_cast<int32_t>(sum));
      for (int64_t w = 0; w < words; ++w)
        s.k[static_cast<size_t>(t * words + w)] = SignedWord(s.codes.data(), w);
#endif
    }
    return finite;
  }

  // Blocks of channels one behind the other, as the kernel walks them: [pairs][channels of the
  // block], a word has two tokens.
  bool ReadValues() const {
    const DF df;
    const DI di;
    const DU du;
    VF odd = hn::Zero(df);
    float* const scales = s.v_scales.data();
    std::fill(scales, scales + stride, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      float* const row = s.rows.data() + t * stride;
      Load(args.v, t, row);
      for (int64_t d = 0; d < stride; d += kLanes) {
        const VF v = hn::Load(df, row + d);
        odd = hn::Add(odd, hn::Sub(v, v));
        hn::Store(hn::Max(hn::Load(df, scales + d), hn::Abs(v)), df, scales + d);
      }
    }
    if (!hn::AllTrue(df, hn::Eq(odd, hn::Zero(df)))) return false;
    std::fill_n(s.rows.data() + tokens * stride, 3 * stride, 0.0f);  // partners of the last token
    const VF most = hn::Set(df, static_cast<float>(Attention8::kValueMost));
    for (int64_t d = 0; d < stride; d += kLanes) {
      const VF scale = hn::Div(hn::Max(hn::Load(df, scales + d), hn::Set(df, 1e-5f)), most);
      hn::Store(scale, df, scales + d);
    }
    const auto code_of = [&](const float* at, VF scale) FRAMEQUILT_INLINE {
      const VF rounded = hn::Round(hn::Div(hn::Load(df, at), scale));
      return hn::ConvertTo(di, hn::Min(hn::Max(rounded, hn::Neg(most)), most));
    };
#if FRAMEQUILT_HAVE_AMX
    const hn::Rebind<int16_t, DF> d16;
    Codes().ClearValuesFrom(RoundUp(tokens, 4));
    for (int64_t t = 0; t < tokens; t += 4) {
      for (int64_t i = 0; i < 4 * stride; i += kLanes) {
        const VI code = code_of(s.rows.data() + t * stride + i, hn::Load(df, scales + i % stride));
        hn::Store(hn::DemoteTo(d16, code), d16, s.v_codes.data() + i);
      }
      Codes().StoreValues(t, s.v_codes.data());
    }
    return true;
#endif
    for (int64_t p = 0; p < pairs; ++p) {
      const float* const row = s.rows.data() + 2 * p * stride;
      for (int64_t d = 0; d < stride; d += kLanes) {
        const VF scale = hn::Load(df, scales + d);
        const auto code = [&](const float* at) FRAMEQUILT_INLINE { return code_of(at, scale); };
        const VU first = hn::BitCast(du, code(row + d));
        const VU second = hn::BitCast(du, code(row + stride + d));
        hn::Store(hn::Or(hn::And(first, hn::Set(du, 0xFFFFu)), hn::ShiftLeft<16>(second)), du,
                  s.pair.data() + d);
      }
      ForBlocks([&](int64_t begin, int64_t count) {
        std::memcpy(s.v.data() + begin * pairs + p * count, s.pair.data() + begin,
                    static_cast<size_t>(count) * sizeof(uint32_t));
      });
    }
    return true;
  }

  // Channels in blocks of even size that the micro kernel takes at once.
  template <class F>
  HWY_INLINE void ForBlocks(const F& f) const {
    const int64_t blocks = (dims + kWordRows - 1) / kWordRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = dims * b / blocks;
      f(begin, dims * (b + 1) / blocks - begin);
    }
  }

  // --- A tile of queries
  // ---------------------------------------------------------------------------

  // factors: what turns the difference of two scores of a row into the exponent of 2.
  void ReadQueries(int64_t row, int64_t rows, float* factors) const {
    float* const padded = s.rows.data();
#if FRAMEQUILT_HAVE_AMX
    for (int64_t r = 0; r < kTileQueries; ++r) {
      Load(args.q, row + std::min(r, rows - 1), padded);  // rows behind the last one repeat it
      float sum, scale, zero;
      QuantizeRow<false>(padded, stride, stride, stride, kCodeFormat, Codes().QueryCodes(r), &sum,
                         nullptr, {}, &scale, &zero);
      factors[r] = scale * args.scale * Constants::kLog2E;
    }
    return;
#endif
    for (int64_t r = 0; r < kTileQueries; ++r) {
      if (r >= rows) {
        factors[r] = 0.0f;
        for (int64_t w = 0; w < words; ++w) s.q[static_cast<size_t>(w * kTileQueries + r)] = 0;
        continue;
      }
      Load(args.q, row + r, padded);
      float sum, scale, zero;
      QuantizeRow<false>(padded, stride, stride, stride, kCodeFormat, s.codes.data(), &sum, nullptr,
                         {}, &scale, &zero);
      factors[r] = scale * args.scale * Constants::kLog2E;
      for (int64_t w = 0; w < words; ++w)
        s.q[static_cast<size_t>(w * kTileQueries + r)] = UnsignedWord(s.codes.data(), w);
    }
    const DU du;
    for (uint32_t* at = s.q.data(); at < s.q.data() + words * kTileQueries; at += kLanes)
      hn::Store(WordVector(hn::Load(du, at)), du, at);
  }

  // scores [tokens][kTileQueries], and the largest of each row.
  void Scores(float* most) const {
#if FRAMEQUILT_HAVE_AMX
    return Codes().Scores(most);
#endif
    ScoreBlock b;
    b.products.b = s.q.data();
    b.products.b_step = kTileQueries;
    b.products.a_row = words;
    b.products.a_step = 1;
    b.products.steps = words;
    b.most = most;
    std::fill(most, most + kTileQueries, -std::numeric_limits<float>::infinity());
    const int64_t blocks = (tokens + kWordRows - 1) / kWordRows;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t begin = tokens * i / blocks, count = tokens * (i + 1) / blocks - begin;
      b.products.a = s.k.data() + begin * words;
      b.starts = s.k_starts.data() + begin;
      b.scales = s.k_scales.data() + begin;
      b.scores = s.scores.data() + begin * kTileQueries;
      kScoreMicros[static_cast<size_t>(count - 1)](b);
    }
  }

  // Scores become codes of probabilities, two tokens a word, in place: what is written lies before
  // what is still to be read. totals: sum of each row.
  void Probabilities(const float* most, const float* factors, float* totals) const {
#if FRAMEQUILT_HAVE_AMX
    return Codes().Probabilities(most, factors, totals);
#endif
    const DF df;
    const DI di;
    VF m[kTileVectors], factor[kTileVectors];
    VI sum[kTileVectors];
    Unrolled<kTileVectors>([&](auto v) FRAMEQUILT_INLINE {
      m[v] = hn::Load(df, most + v * kLanes);
      factor[v] = hn::Load(df, factors + v * kLanes);
      sum[v] = hn::Zero(di);
    });
    float* const scores = s.scores.data();
    if (tokens % 2 != 0)  // code 0
      std::fill_n(scores + tokens * kTileQueries, kTileQueries,
                  -std::numeric_limits<float>::infinity());
    for (int64_t p = 0; p < pairs; ++p) {
      const float* const from = scores + 2 * p * kTileQueries;
      Unrolled<kTileVectors>([&](auto v) FRAMEQUILT_INLINE {
        const auto code = [&](const float* at) FRAMEQUILT_INLINE {
          return ProbabilityCode(hn::Mul(hn::Sub(hn::Load(df, at), m[v]), factor[v]));
        };
        const VU word = PairWord(code(from + v * kLanes), code(from + kTileQueries + v * kLanes));
        sum[v] = PairDot(sum[v], word, hn::Set(DU(), 0x00010001u));  // adds both
        hn::Store(hn::BitCast(df, word), df, scores + p * kTileQueries + v * kLanes);
      });
    }
    Unrolled<kTileVectors>([&](auto v) FRAMEQUILT_INLINE {
      hn::Store(hn::ConvertTo(df, sum[v]), df, totals + v * kLanes);
    });
  }

  // out [dims][kTileQueries], before the scales.
  void Values() const {
#if FRAMEQUILT_HAVE_AMX
    return Codes().Values();
#endif
    ValueBlock b;
    b.products.b_step = kTileQueries;
    b.products.a_row = 1;
    const auto* const p = reinterpret_cast<const uint32_t*>(s.scores.data());
    for (int64_t begin = 0; begin < pairs; begin += kSpanPairs) {
      b.products.b = p + begin * kTileQueries;
      b.products.steps = std::min(kSpanPairs, pairs - begin);
      b.first = begin == 0;
      ForBlocks([&](int64_t channel, int64_t count) {
        b.products.a = s.v.data() + channel * pairs + begin * count;
        b.products.a_step = count;
        b.out = s.out.data() + channel * kTileQueries;
        kValueMicros[static_cast<size_t>(count - 1)](b);
      });
    }
  }

  void Finish(int64_t row, int64_t rows, const float* totals, const float* factors) const {
    const DF df;
    float* const out = s.out.data();
#if FRAMEQUILT_HAVE_AMX
    for (int64_t r = 0; r < rows; ++r) {
      const float odd = factors[r] - factors[r];
      const VF inverse = hn::Set(df, 1.0f / totals[r] + odd);
      float* const to = args.out + base + (row + r) * args.stride;
      for (int64_t d = 0; d < dims; d += kLanes) {
        const VF scaled = hn::Mul(hn::Load(df, out + r * stride + d), hn::Load(df, s.v_scales.data() + d));
        const auto real = hn::FirstN(df, static_cast<size_t>(std::min<int64_t>(kLanes, dims - d)));
        hn::BlendedStore(hn::Mul(scaled, inverse), real, df, to + d);
      }
    }
    return;
#endif
    Unrolled<kTileVectors>([&](auto v) FRAMEQUILT_INLINE {
      const VF factor = hn::Load(df, factors + v * kLanes);
      const VF odd = hn::Sub(factor, factor);  // NaN where the query is not finite
      const VF total = hn::Load(df, totals + v * kLanes);
      const VF inverse = hn::Add(hn::Div(hn::Set(df, 1.0f), total), odd);
      for (int64_t d = 0; d < dims; ++d) {
        float* const at = out + d * kTileQueries + v * kLanes;
        const VF scaled =
            hn::Mul(hn::Load(df, at), hn::Set(df, s.v_scales[static_cast<size_t>(d)]));
        hn::Store(hn::Mul(scaled, inverse), df, at);
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = args.out + base + (row + r) * args.stride;
      for (int64_t d = 0; d < dims; ++d) to[d] = out[d * kTileQueries + r];
    }
  }

  void Run() const {
    if (!ReadKeys() || !ReadValues()) {
      for (int64_t t = 0; t < tokens; ++t) {
        std::fill_n(args.out + base + t * args.stride, dims,
                    std::numeric_limits<float>::quiet_NaN());
      }
      return;
    }
    HWY_ALIGN float most[kTileQueries];
    HWY_ALIGN float factors[kTileQueries];
    HWY_ALIGN float totals[kTileQueries];
#if FRAMEQUILT_HAVE_AMX
    const Tiles registers;
#endif
    for (int64_t row = 0; row < tokens; row += kTileQueries) {
      const int64_t rows = std::min(kTileQueries, tokens - row);
      ReadQueries(row, rows, factors);
      Scores(most);
      Probabilities(most, factors, totals);
      Values();
      Finish(row, rows, totals, factors);
    }
  }
};

void IntegerEncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  std::vector<EncoderAttentionScratch>& scratch = encoder_attention_scratch(pool.threads());
  for (EncoderAttentionScratch& s : scratch) Head(args, s, 0).Reserve();
  pool.parallel_for(args.blocks * args.heads, [&](int64_t item, int thread) {
    Head(args, scratch[static_cast<size_t>(thread)], item).Run();
  });
}

#else  // targets without the dot product

void IntegerEncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  scalar_kernels().integer_encoder_attention(args, pool);
}

#endif
}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(IntegerEncoderAttention);

#if FRAMEQUILT_AMX
void fill_amx_encoder_attention_kernels(Kernels& kernels) {
#else
void fill_integer_encoder_attention_kernels(Kernels& kernels) {
#endif
  kernels.integer_encoder_attention = &HWY_DYNAMIC_DISPATCH(IntegerEncoderAttention);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
