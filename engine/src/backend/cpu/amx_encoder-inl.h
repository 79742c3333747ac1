// Encoder attention with 8-bit queries and keys, with the matrix registers of AMX: the two products
// of ops/integer_attention.cc and the softmax between them, for 32 rows of queries at a time. Rows
// are queries and columns tokens, then channels. Values (11 bits) and codes of probabilities (14)
// are multiplied byte by byte: with p = 256 ph + pl and v = 256 vh + vl the sum is that of four
// sums, exactly. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_AMX_ENCODER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_AMX_ENCODER_INL_H_
#undef FRAMEQUILT_CPU_AMX_ENCODER_INL_H_
#else
#define FRAMEQUILT_CPU_AMX_ENCODER_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "hwy/highway.h"
#include "src/backend/cpu/amx-inl.h"
#include "src/backend/cpu/amx_attention-inl.h"
#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/word_products-inl.h"
#include "src/ops/integer_attention.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_AMX

// The codes of a head in the scratch, and what is computed from them: what EncoderWords is to other
// targets.
struct EncoderTiles {
  static constexpr int64_t kQueries = 2 * kTileSide;  // of a tile

  EncoderAttentionScratch& s;
  int64_t tokens, dims;
  int64_t key_bytes;      // of a row of keys or queries, whole tiles, 0 behind its last code
  int64_t columns;        // tokens in pairs of tiles: words of a row of keys
  int64_t value_tokens;   // tokens in whole tiles
  int64_t channel_tiles;  // tiles of 16 channels

  EncoderTiles(EncoderAttentionScratch& scratch, int64_t token_count, int64_t head_dim)
      : s(scratch),
        tokens(token_count),
        dims(head_dim),
        key_bytes(TiledInputs(head_dim)),
        columns(RoundUp(token_count, kSumColumns)),
        value_tokens(TiledInputs(token_count)),
        channel_tiles((head_dim + kTileSide - 1) / kTileSide) {}

  int64_t value_stride() const { return channel_tiles * kSumColumns; }  // words
  int64_t out_stride() const { return channel_tiles * kTileSide; }

  void Reserve() const {
    const auto reserve = [](auto& buffer, int64_t count) {
      buffer.reserve(static_cast<size_t>(count));
    };
    reserve(s.k, key_bytes / 4 * columns);
    reserve(s.k_scales, columns);
    reserve(s.v, value_tokens / 4 * value_stride());
    reserve(s.q_codes, kQueries * key_bytes);
    reserve(s.scores, kQueries * columns);
    reserve(s.p_high, kQueries * value_tokens);
    reserve(s.p_low, kQueries * value_tokens);
    reserve(s.out, kQueries * out_stride());
  }

  // --- Operands --------------------------------------------------------------------------------

  // Zeros where no key is: behind the dims of all tokens and in the columns behind the last one.
  void StartKeys() const {
    std::fill_n(s.k.data(), key_bytes / 4 * columns, 0u);
    std::fill_n(s.k_scales.data(), columns, 0.0f);
  }
  // Keys: [key_bytes / 4][columns] words of 4 dims. Behind the codes there are zeros up to a word.
  void AddKey(int64_t token, const int8_t* codes, int32_t) const {
    uint32_t* to = s.k.data() + token;
    for (int64_t d = 0; d < dims; d += 4, to += columns) std::memcpy(to, codes + d, 4);
  }

  // Tokens behind the last four.
  void StartValues() const {
    std::fill(s.v.data() + (tokens + 3) / 4 * value_stride(),
              s.v.data() + value_tokens / 4 * value_stride(), 0u);
  }
  void EndValues() const {}
  // As [value_tokens / 4][channel_tiles][high, low][16] words of 4 tokens.
  template <class Code>
  void AddValues(int64_t token, const Code& code) const {
    const DU du;
    uint32_t* to = s.v.data() + token / 4 * value_stride();
    for (int64_t d = 0; d < out_stride(); d += kTileSide, to += kSumColumns) {
      VU high = hn::Zero(du), low = high;
      Unrolled<4>([&](auto t) FRAMEQUILT_INLINE {
        const VU bits = hn::BitCast(du, code(t, d)), byte = hn::Set(du, 0xFFu);
        low = hn::Or(low, hn::ShiftLeft<8 * t>(hn::And(bits, byte)));
        high = hn::Or(high, hn::ShiftLeft<8 * t>(hn::And(hn::ShiftRight<8>(bits), byte)));
      });
      hn::Store(high, du, to);
      hn::Store(low, du, to + kTileSide);
    }
  }

  // What lies behind the codes of a query is multiplied with zeros.
  void AddQuery(int64_t query, const int8_t* codes) const {
    std::memcpy(s.q_codes.data() + query * key_bytes, codes, static_cast<size_t>(dims));
  }
  void EndQueries() const {}

  // --- A tile of queries -----------------------------------------------------------------------

  // scores [queries][columns], -infinity behind the last token; most [queries].
  void Scores(float* most) const {
    const DF df;
    HWY_ALIGN float lanes[kQueries * kLanes];
    std::fill_n(lanes, kQueries * kLanes, -std::numeric_limits<float>::infinity());
    TileOperands in;
    in.stride = key_bytes;
    in.word_stride = columns;
    in.tiles = key_bytes / kTileBytes;
    ForTileBlocks(
        columns / kSumColumns,
        [&](int64_t block, int32_t* sums) FRAMEQUILT_INLINE {
          in.words = s.k.data() + block * kSumColumns;
          Unrolled<2>([&](auto half) FRAMEQUILT_INLINE {
            in.inputs = s.q_codes.data() + half * kTileSide * key_bytes;
            MultiplyTiles<TileKind{.left = true, .right = true}>(in, sums + half * kSums);
          });
        },
        [&](int64_t block, const int32_t* sums) FRAMEQUILT_INLINE {
          const int64_t column = block * kSumColumns;
          Unrolled<2>([&](auto v) FRAMEQUILT_INLINE {
            const int64_t at = column + v * kLanes;
            const VF scale = hn::Load(df, s.k_scales.data() + at);
            const auto real =
                hn::FirstN(df, static_cast<size_t>(std::clamp<int64_t>(tokens - at, 0, kLanes)));
            const VF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
            for (int64_t q = 0; q < kQueries; ++q) {
              const VI sum = hn::Load(DI(), sums + q * kSumColumns + v * kLanes);
              const VF product = hn::Mul(hn::ConvertTo(df, sum), scale);
              const VF score = hn::IfThenElse(real, product, lowest);
              hn::Store(score, df, s.scores.data() + q * columns + at);
              float* const largest = lanes + q * kLanes;
              hn::Store(hn::Max(hn::Load(df, largest), score), df, largest);
            }
          });
        });
    for (int64_t q = 0; q < kQueries; ++q)
      most[q] = hn::GetLane(hn::MaxOfLanes(df, hn::Load(df, lanes + q * kLanes)));
  }

  // Codes of the probabilities, [queries][value_tokens], and their sums.
  void Probabilities(const float* most, const float* factors, float* totals) const {
    const DF df;
    const auto bytes = [](VU codes, uint8_t* to) FRAMEQUILT_INLINE {
      _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes.raw));
    };
    for (int64_t q = 0; q < kQueries; ++q) {
      const VF m = hn::Set(df, most[q]), factor = hn::Set(df, factors[q]);
      const float* const scores = s.scores.data() + q * columns;
      uint8_t* const high = s.p_high.data() + q * value_tokens;
      uint8_t* const low = s.p_low.data() + q * value_tokens;
      VI sum = hn::Zero(DI());
      for (int64_t t = 0; t < columns; t += kLanes) {
        const VF x = hn::Mul(hn::Sub(hn::Load(df, scores + t), m), factor);
        const VU code = hn::And(ProbabilityCode(x), hn::Set(DU(), 0xFFFFu));
        sum = hn::Add(sum, hn::BitCast(DI(), code));
        bytes(code, low + t);
        bytes(hn::ShiftRight<8>(code), high + t);
      }
      std::fill(low + columns, low + value_tokens, uint8_t{0});
      std::fill(high + columns, high + value_tokens, uint8_t{0});
      totals[q] = static_cast<float>(hn::GetLane(hn::SumOfLanes(DI(), sum)));
    }
  }

  // out [queries][out_stride], before the scales.
  void Values() const {
    constexpr int64_t kSpan = ops::IntegerAttention::kValueSpan;
    const DF df;
    TileOperands in;
    in.stride = value_tokens;
    in.word_stride = value_stride();
    for (int64_t begin = 0; begin < value_tokens; begin += kSpan) {
      in.tiles = std::min(kSpan, value_tokens - begin) / kTileBytes;
      ForTileBlocks(
          2 * channel_tiles,
          [&](int64_t block, int32_t* sums) FRAMEQUILT_INLINE {
            const int64_t at = block % 2 * kTileSide * value_tokens + begin;
            in.words = s.v.data() + begin / 4 * value_stride() + block / 2 * kSumColumns;
            constexpr TileKind kKind{.inputs = false, .left = true};
            in.inputs = s.p_high.data() + at;
            MultiplyTiles<kKind>(in, sums);
            in.inputs = s.p_low.data() + at;
            MultiplyTiles<kKind>(in, sums + kSums);
          },
          [&](int64_t block, const int32_t* sums) FRAMEQUILT_INLINE {
            float* out =
                s.out.data() + block % 2 * kTileSide * out_stride() + block / 2 * kTileSide;
            const int32_t* const low = sums + kSums;
            for (int64_t q = 0; q < kTileSide; ++q, out += out_stride()) {
              const int64_t at = q * kSumColumns;
              const VI high_high = hn::Load(DI(), sums + at);
              const VI high_low = hn::Load(DI(), sums + at + kTileSide);
              const VI low_high = hn::Load(DI(), low + at);
              const VI low_low = hn::Load(DI(), low + at + kTileSide);
              const VI middle = hn::Add(hn::ShiftLeft<8>(high_high), hn::Add(high_low, low_high));
              const VF sum = hn::ConvertTo(df, hn::Add(hn::ShiftLeft<8>(middle), low_low));
              hn::Store(begin == 0 ? sum : hn::Add(hn::Load(df, out), sum), df, out);
            }
          });
    }
  }

  // As EncoderWords::Finish.
  void Finish(int64_t rows, const float* inverses, float* to, int64_t to_stride) const {
    const DF df;
    const float* out = s.out.data();
    for (int64_t r = 0; r < rows; ++r, out += out_stride(), to += to_stride) {
      const VF inverse = hn::Set(df, inverses[r]);
      for (int64_t d = 0; d < dims; d += kLanes) {
        const VF scaled = hn::Mul(hn::Load(df, out + d), hn::Load(df, s.v_scales.data() + d));
        const auto real = hn::FirstN(df, static_cast<size_t>(std::min<int64_t>(kLanes, dims - d)));
        hn::BlendedStore(hn::Mul(scaled, inverse), real, df, to + d);
      }
    }
  }
};

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
