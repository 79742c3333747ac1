// Encoder attention with 8-bit queries and keys, in words of vectors: the two products of
// ops/integer_attention.cc and the softmax between them, for a tile of query rows at a time. A
// vector holds the same thing of kLanes queries (scores of one token, one channel of the output),
// so that the softmax needs no sum or maximum across lanes and no head dimension wastes lanes;
// tokens and channels are broadcast. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_WORD_ENCODER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_WORD_ENCODER_INL_H_
#undef FRAMEQUILT_CPU_WORD_ENCODER_INL_H_
#else
#define FRAMEQUILT_CPU_WORD_ENCODER_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "hwy/highway.h"
#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/pages-inl.h"
#include "src/backend/cpu/transpose-inl.h"
#include "src/backend/cpu/word_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT
inline namespace FRAMEQUILT_DOT_NAMESPACE {

// The codes of a head in the scratch, and what is computed from them.
struct EncoderWords {
  static constexpr int kVectors = 2;
  static constexpr int64_t kQueries = kVectors * kLanes;  // of a tile
  static constexpr int64_t kSpanPairs = ops::IntegerAttention::kValueSpan / 2;

  EncoderAttentionScratch& s;
  int64_t tokens, pairs, dims;
  int64_t stride;  // dims in whole vectors
  int64_t words;   // of the codes of a row

  EncoderWords(EncoderAttentionScratch& scratch, int64_t token_count, int64_t head_dim)
      : s(scratch),
        tokens(token_count),
        pairs((token_count + 1) / 2),
        dims(head_dim),
        stride(RoundUp(head_dim, kLanes)),
        words((head_dim + kWordCodes - 1) / kWordCodes) {}

  void Reserve() const {
    const auto reserve = [](auto& buffer, int64_t count) {
      buffer.reserve(static_cast<size_t>(count));
    };
    reserve(s.k, tokens * words);
    reserve(s.k_scales, tokens);
    reserve(s.k_starts, tokens);
    reserve(s.v, pairs * dims);
    reserve(s.pair, stride);
    reserve(s.q, words * kQueries);
    reserve(s.scores, 2 * pairs * kQueries);
    reserve(s.out, std::max(dims * kQueries, stride));
#if FRAMEQUILT_HAVE_FOLD
    reserve(s.v_starts, (pairs + kSpanPairs - 1) / kSpanPairs * stride);
#endif
  }

  // --- Operands ----------------------------------------------------------------------------------

  void StartKeys() const {}
  // `sum`: of the codes.
  void AddKey(int64_t token, const int8_t* codes, int32_t sum) const {
    s.k_starts[static_cast<size_t>(token)] = WordStart(sum);
    for (int64_t w = 0; w < words; ++w)
      s.k[static_cast<size_t>(token * words + w)] = KeyWord(codes, w);
  }

  void StartValues() const {}
  // Of 4 tokens, with 0 behind the last one: code(i, d) is the vector of codes of token `token` + i
  // from channel d on. Blocks of channels lie one behind the other, as the kernel walks them:
  // [pairs][channels of the block], a word has two tokens.
  template <class Code>
  void AddValues(int64_t token, const Code& code) const {
    for (int64_t t = 0; t < 4 && token / 2 + t / 2 < pairs; t += 2) {
      const int64_t p = (token + t) / 2;
      for (int64_t d = 0; d < stride; d += kLanes) {
        const VU first = hn::BitCast(DU(), code(t, d)), second = hn::BitCast(DU(), code(t + 1, d));
        hn::Store(hn::Or(hn::And(first, hn::Set(DU(), 0xFFFFu)), hn::ShiftLeft<16>(second)), DU(),
                  s.pair.data() + d);
      }
      ForBlocks([&](int64_t begin, int64_t count) {
        std::memcpy(s.v.data() + begin * pairs + p * count, s.pair.data() + begin,
                    static_cast<size_t>(count) * sizeof(uint32_t));
      });
    }
  }

  void EndValues() const {
#if FRAMEQUILT_HAVE_FOLD
    // Of each span and channel (ValueBlock::of_channels).
    int32_t* starts = s.v_starts.data();
    for (int64_t begin = 0; begin < pairs; begin += kSpanPairs, starts += stride) {
      const int64_t steps = std::min(kSpanPairs, pairs - begin);
      ForBlocks([&](int64_t channel, int64_t count) {
        const uint32_t* const words = s.v.data() + channel * pairs + begin * count;
        const auto some = hn::FirstN(DU(), static_cast<size_t>(count));
        VI sum = hn::Zero(DI());
        ForFolded(steps, [&](int64_t step) FRAMEQUILT_INLINE {
          const uint32_t* const at = words + step * count;
          sum =
              PairDot(sum, hn::MaskedLoad(some, DU(), at), hn::MaskedLoad(some, DU(), at + count));
        });
        hn::BlendedStore(hn::Neg(sum), hn::FirstN(DI(), static_cast<size_t>(count)), DI(),
                         starts + channel);
      });
    }
#endif
  }

  // Of all queries of a tile.
  void AddQuery(int64_t query, const int8_t* codes) const {
    for (int64_t w = 0; w < words; ++w)
      s.q[static_cast<size_t>(w * kQueries + query)] = QueryWord(codes, w);
  }
  void EndQueries() const {
    for (uint32_t* at = s.q.data(); at < s.q.data() + words * kQueries; at += kLanes)
      hn::Store(WordVector(hn::Load(DU(), at)), DU(), at);
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

  // --- A tile of queries -------------------------------------------------------------------------

  // scores [tokens][kQueries], and the largest of each row.
  void Scores(float* most) const {
    ScoreBlock b;
    b.products.b = s.q.data();
    b.products.b_step = kQueries;
    b.products.a_row = words;
    b.products.a_step = 1;
    b.products.steps = words;
    b.most = most;
    std::fill(most, most + kQueries, -std::numeric_limits<float>::infinity());
    const int64_t blocks = (tokens + kWordRows - 1) / kWordRows;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t begin = tokens * i / blocks, count = tokens * (i + 1) / blocks - begin;
      b.products.a = s.k.data() + begin * words;
      b.starts = s.k_starts.data() + begin;
      b.scales = s.k_scales.data() + begin;
      b.scores = s.scores.data() + begin * kQueries;
      kScoreMicros[static_cast<size_t>(count - 1)](b);
    }
  }

  // Scores become codes of probabilities, two tokens a word, in place: what is written lies before
  // what is still to be read. totals: sum of each row.
  void Probabilities(const float* most, const float* factors, float* totals) const {
    const DF df;
    const DI di;
    VF m[kVectors], factor[kVectors];
    VI sum[kVectors];
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      m[v] = hn::Load(df, most + v * kLanes);
      factor[v] = hn::Load(df, factors + v * kLanes);
      sum[v] = hn::Zero(di);
    });
    float* const scores = s.scores.data();
    if (tokens % 2 != 0)  // code 0
      std::fill_n(scores + tokens * kQueries, kQueries, -std::numeric_limits<float>::infinity());
    for (int64_t p = 0; p < pairs; ++p) {
      const float* const from = scores + 2 * p * kQueries;
      Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
        const auto code = [&](const float* at) FRAMEQUILT_INLINE {
          return ProbabilityCode(hn::Mul(hn::Sub(hn::Load(df, at), m[v]), factor[v]));
        };
        const VU word = PairWord(code(from + v * kLanes), code(from + kQueries + v * kLanes));
        sum[v] = PairDot(sum[v], word, hn::Set(DU(), 0x00010001u));  // adds both
        hn::Store(hn::BitCast(df, word), df, scores + p * kQueries + v * kLanes);
      });
    }
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      hn::Store(hn::ConvertTo(df, sum[v]), df, totals + v * kLanes);
    });
  }

  // out [dims][kQueries], before the scales.
  void Values() const {
    ValueBlock b;
    b.products.b_step = kQueries;
    b.products.a_row = 1;
    const auto* const p = reinterpret_cast<const uint32_t*>(s.scores.data());
    for (int64_t begin = 0; begin < pairs; begin += kSpanPairs) {
      b.products.b = p + begin * kQueries;
      b.products.steps = std::min(kSpanPairs, pairs - begin);
      b.first = begin == 0;
#if FRAMEQUILT_HAVE_FOLD
      HWY_ALIGN int32_t of_queries[kQueries];
      VI sums[kVectors];
      Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE { sums[v] = hn::Zero(DI()); });
      ForFolded(b.products.steps, [&](int64_t step) FRAMEQUILT_INLINE {
        const uint32_t* const at = b.products.b + step * kQueries;
        Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
          sums[v] = PairDot(sums[v], hn::Load(DU(), at + v * kLanes),
                            hn::Load(DU(), at + kQueries + v * kLanes));
        });
      });
      Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
        hn::Store(hn::Neg(sums[v]), DI(), of_queries + v * kLanes);
      });
      b.of_queries = of_queries;
#endif
      ForBlocks([&](int64_t channel, int64_t count) {
        b.products.a = s.v.data() + channel * pairs + begin * count;
        b.products.a_step = count;
        b.out = s.out.data() + channel * kQueries;
#if FRAMEQUILT_HAVE_FOLD
        b.of_channels = s.v_starts.data() + begin / kSpanPairs * stride + channel;
#endif
        kValueMicros[static_cast<size_t>(count - 1)](b);
      });
    }
  }

  // The outputs of `rows` queries, out_stride apart. inverses: 1 / total, NaN where a query is not
  // finite.
  void Finish(int64_t rows, const float* inverses, float* to, int64_t to_stride) const {
    const DF df;
    float* const out = s.out.data();
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      const VF inverse = hn::Load(df, inverses + v * kLanes);
      for (int64_t d = 0; d < dims; ++d) {
        float* const at = out + d * kQueries + v * kLanes;
        const VF scaled =
            hn::Mul(hn::Load(df, at), hn::Set(df, s.v_scales[static_cast<size_t>(d)]));
        hn::Store(hn::Mul(scaled, inverse), df, at);
      }
    });
    Transpose(out, kQueries, dims, rows, to, to_stride);
  }
};

}  // namespace FRAMEQUILT_DOT_NAMESPACE
#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
