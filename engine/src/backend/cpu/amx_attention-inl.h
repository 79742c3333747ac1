// Attention over KV with codes, with the matrix registers of AMX: many rows times the codes of a
// page, whose words hold 4 codes here. Codes of queries and of weights have 16 bits: their high and
// low bytes are multiplied apart, and 256 times the sum of the one and that of the other is the
// same integer as in code_products-inl.h. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_AMX_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_AMX_ATTENTION_INL_H_
#undef FRAMEQUILT_CPU_AMX_ATTENTION_INL_H_
#else
#define FRAMEQUILT_CPU_AMX_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "src/backend/cpu/amx-inl.h"
#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/code_products-inl.h"
#include "src/backend/cpu/pages-inl.h"

#if HWY_ARCH_X86
#include <immintrin.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_AMX

// Fewer rows take less time with words of two codes: the cost of a tile does not fall with them.
constexpr int64_t kAmxLeastRows = 24;

// --- Codes of a page ---------------------------------------------------------------------------

using D8 = hn::Repartition<uint8_t, DU>;
using V8 = hn::Vec<D8>;
constexpr int64_t kByteColumns = kLanes * 4;  // of a vector of bytes

// Codes of columns [column, column + 64) of one row of a matrix, the first `columns` of them.
template <int kBits>
HWY_INLINE V8 RowOfCodes(const KvPart& part, const std::byte* head, int64_t row, int64_t column,
                         int64_t columns) {
  constexpr quant::KvPlanes kPlanes = quant::kv_planes(kBits);
  const D8 d8;
  const auto* const bytes = reinterpret_cast<const uint8_t*>(head) + column;
  const auto mask = hn::FirstN(d8, static_cast<size_t>(columns));
  const auto plane = [&](size_t at, auto bits) FRAMEQUILT_INLINE {
    constexpr int kPlaneBits = decltype(bits)::value, kRows = 8 / kPlaneBits;
    const V8 raw = hn::MaskedLoad(mask, d8, bytes + at + row / kRows * part.columns);
    if constexpr (kRows == 1) return raw;
    const hn::Repartition<uint16_t, D8> d16;
    const int shift = static_cast<int>(row % kRows) * kPlaneBits;
    const V8 moved = hn::BitCast(d8, hn::ShiftRightSame(hn::BitCast(d16, raw), shift));
    return hn::And(moved, hn::Set(d8, (1 << kPlaneBits) - 1));
  };
  const V8 low = plane(part.low, std::integral_constant<int, kPlanes.low>());
  if constexpr (kPlanes.high == 0) return low;
  const V8 high =
      plane(part.high, std::integral_constant < int, kPlanes.high == 0 ? 8 : kPlanes.high > ());
  return hn::Or(low, hn::BitCast(d8, hn::ShiftLeft<kPlanes.low>(
                                         hn::BitCast(hn::Repartition<uint16_t, D8>(), high))));
}

// 64 columns of 4 rows as words: the codes of a column, in 4 vectors of 16 words.
HWY_INLINE void StoreWords(V8 row0, V8 row1, V8 row2, V8 row3, uint32_t* out) {
  const __m512i low01 = _mm512_unpacklo_epi8(row0.raw, row1.raw);
  const __m512i high01 = _mm512_unpackhi_epi8(row0.raw, row1.raw);
  const __m512i low23 = _mm512_unpacklo_epi8(row2.raw, row3.raw);
  const __m512i high23 = _mm512_unpackhi_epi8(row2.raw, row3.raw);
  // Words of the columns 16 i + 4 j .. 16 i + 4 j + 3, block i of 128 bits of vector j.
  const __m512i a = _mm512_unpacklo_epi16(low01, low23), b = _mm512_unpackhi_epi16(low01, low23);
  const __m512i c = _mm512_unpacklo_epi16(high01, high23);
  const __m512i d = _mm512_unpackhi_epi16(high01, high23);
  // And transposed: vector i has block j.
  const __m512i ab02 = _mm512_shuffle_i32x4(a, b, 0x88), ab13 = _mm512_shuffle_i32x4(a, b, 0xDD);
  const __m512i cd02 = _mm512_shuffle_i32x4(c, d, 0x88), cd13 = _mm512_shuffle_i32x4(c, d, 0xDD);
  hn::Store(VU{_mm512_shuffle_i32x4(ab02, cd02, 0x88)}, DU(), out);
  hn::Store(VU{_mm512_shuffle_i32x4(ab13, cd13, 0x88)}, DU(), out + kLanes);
  hn::Store(VU{_mm512_shuffle_i32x4(ab02, cd02, 0xDD)}, DU(), out + 2 * kLanes);
  hn::Store(VU{_mm512_shuffle_i32x4(ab13, cd13, 0xDD)}, DU(), out + 3 * kLanes);
}

// Rows [begin, begin + rows) of a matrix, rows behind its last one as 0: out [rows / 4][stride]
// words, `columns` of them, the stride a multiple of 64.
template <int kBits>
void ReadBytesOf(const KvPart& part, const std::byte* head, int64_t begin, int64_t rows,
                 int64_t columns, int64_t stride, uint32_t* out, Ahead& ahead) {
  const int64_t end = std::min<int64_t>(begin + rows, part.rows);
  for (int64_t row = begin; row < begin + rows; row += 4, out += stride) {
    ahead.Ask(2);
    for (int64_t column = 0; column < columns; column += kByteColumns) {
      const auto codes = [&](int64_t r) FRAMEQUILT_INLINE {
        if (r >= end) return hn::Zero(D8());
        return RowOfCodes<kBits>(part, head, r, column, std::min(kByteColumns, columns - column));
      };
      StoreWords(codes(row), codes(row + 1), codes(row + 2), codes(row + 3), out + column);
    }
  }
}

inline void ReadBytes(const KvPart& part, const std::byte* head, int64_t begin, int64_t rows,
                      int64_t columns, int64_t stride, uint32_t* out, Ahead& ahead) {
  WithBits(part.bits, [&](auto bits) FRAMEQUILT_INLINE {
    ReadBytesOf<bits>(part, head, begin, rows, columns, stride, out, ahead);
  });
}

// --- High and low bytes ------------------------------------------------------------------------

// The bytes of `count` codes of 16 bits, up to a whole tile with 0.
HWY_INLINE void SplitCodes(const int16_t* codes, int64_t count, uint8_t* high, uint8_t* low) {
  const hn::Repartition<int16_t, DU> d16;
  constexpr int64_t kHalf = kTileBytes / 2;
  for (int64_t begin = 0; begin < count; begin += kTileBytes) {
    for (int64_t i = begin; i < begin + kTileBytes; i += kHalf) {
      const auto some =
          hn::FirstN(d16, static_cast<size_t>(std::clamp<int64_t>(count - i, 0, kHalf)));
      const __m512i both = hn::MaskedLoad(some, d16, codes + i).raw;
      const auto to = [&](uint8_t* bytes)
                          FRAMEQUILT_INLINE { return reinterpret_cast<__m256i*>(bytes + i); };
      _mm256_storeu_si256(to(low), _mm512_cvtepi16_epi8(both));
      _mm256_storeu_si256(to(high), _mm512_cvtepi16_epi8(_mm512_srli_epi16(both, 8)));
    }
  }
}

// Room for the bytes of `rows` rows of a tile and for the words of a page, with what products read
// beside them.
inline void ReserveBytes(const KvPageLayout& layout, int64_t rows, AttentionScratch& s) {
  s.q_rows = std::max(s.q_rows, rows);
  const int64_t spare = s.q_rows + kTileSide, inputs = TiledInputs(layout.k.group);
  const auto reserve = [](auto& buffer, int64_t count) {
    buffer.reserve(static_cast<size_t>(count));
  };
  if (layout.k.has_codes()) {
    reserve(s.q_high, spare * inputs * layout.k.groups);
    reserve(s.q_low, spare * inputs * layout.k.groups);
    reserve(s.words, inputs / 4 * kPageTokens);
  }
  if (layout.v.has_codes()) {
    reserve(s.weight_high, spare * kPageTokens);
    reserve(s.weight_low, spare * kPageTokens);
    reserve(s.words, kPageTokens / 4 * TiledInputs(layout.head_dim) + kSumColumns);
  }
}

// Where the bytes of a row of queries are, for one group of dims: [groups][rows][inputs].
inline int64_t QueryBytes(const KvPart& part, const AttentionScratch& s, int64_t group,
                          int64_t row) {
  return (group * s.q_rows + row) * TiledInputs(part.group);
}

inline void SplitQuery(const KvPart& part, int64_t row, AttentionScratch& s) {
  const int64_t stride = (part.group + 1) / 2 * 2;
  const int16_t* const codes = s.q_codes.data() + row * stride * part.groups;
  for (int64_t g = 0; g < part.groups; ++g) {
    const int64_t at = QueryBytes(part, s, g, row);
    SplitCodes(codes + g * stride, part.group, s.q_high.data() + at, s.q_low.data() + at);
  }
}

// --- Products ----------------------------------------------------------------------------------

// Calls finish(row, rows, column, vectors, sums) for 16 rows and 32 columns at a time, or what is
// left of them: sums [16][kSumColumns] of the high bytes, and behind them those of the low ones.
template <bool kSigned, class Finish>
void ByteProducts(const uint8_t* high, const uint8_t* low, int64_t inputs, int64_t rows,
                  const uint32_t* words, int64_t word_stride, int64_t columns, Ahead& ahead,
                  const Finish& finish) {
  const Tiles tiles;
  TileOperands in;
  in.stride = inputs;
  in.word_stride = word_stride;
  in.tiles = inputs / kTileBytes;
  const int64_t row_tiles = (rows + kTileSide - 1) / kTileSide;
  const int64_t column_tiles = (columns + kSumColumns - 1) / kSumColumns;
  ForTileBlocks(
      row_tiles * column_tiles,
      [&](int64_t block, int32_t* sums) FRAMEQUILT_INLINE {
        ahead.Ask(4);
        const int64_t row = block % row_tiles * kTileSide;
        in.words = words + block / row_tiles * kSumColumns;
        in.inputs = high + row * inputs;
        MultiplyTiles<TileKind{.inputs = kSigned}>(in, sums);
        in.inputs = low + row * inputs;
        MultiplyTiles<TileKind{.inputs = false}>(in, sums + kSums);
      },
      [&](int64_t block, const int32_t* sums) FRAMEQUILT_INLINE {
        const int64_t row = block % row_tiles * kTileSide;
        const int64_t column = block / row_tiles * kSumColumns;
        const int64_t count = std::min(kTileSide, rows - row);
        if (columns - column > kTileSide) {
          finish(row, count, column, std::integral_constant<int, 2>(), sums);
        } else {
          finish(row, count, column, std::integral_constant<int, 1>(), sums);
        }
      });
}

HWY_INLINE VI WholeSum(const int32_t* sums, int64_t at) {
  const VI high = hn::Load(DI(), sums + at);
  return hn::Add(hn::ShiftLeft<8>(high), hn::Load(DI(), sums + kSums + at));
}

// PageScores of rows of queries whose bytes are in the scratch.
inline void AmxScores(const KvPageLayout& layout, const std::byte* head, int64_t first,
                      int64_t rows, AttentionScratch& s, float* scores, int64_t stride,
                      Ahead ahead) {
  const KvPart& part = layout.k;
  const PageParams params = ReadParams(layout, part, head, s.scales.data(), s.zeros.data());
  const int64_t inputs = TiledInputs(part.group);
  for (int64_t g = 0; g < part.groups; ++g) {
    ReadBytes(part, head, g * part.group, inputs, kPageTokens, kPageTokens, s.words.data(), ahead);
    const float* const scales = params.scales + g * kPageTokens;
    const int32_t* const zeros = params.zeros + g * kPageTokens;
    const int32_t* const query_sums = s.q_sums.data() + first * part.groups + g;
    const int64_t at = QueryBytes(part, s, g, first);
    ByteProducts<true>(s.q_high.data() + at, s.q_low.data() + at, inputs, rows, s.words.data(),
                       kPageTokens, kPageTokens, ahead,
                       [&](int64_t row, int64_t count, int64_t column, auto vectors,
                           const int32_t* sums) FRAMEQUILT_INLINE {
                         constexpr int kVectors = decltype(vectors)::value;
                         VF scale[kVectors];
                         VI zero[kVectors];
                         Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
                           scale[v] = hn::Load(DF(), scales + column + v * kLanes);
                           zero[v] = hn::Load(DI(), zeros + column + v * kLanes);
                         });
                         for (int64_t r = 0; r < count; ++r) {
                           const VI of_query = hn::Set(DI(), query_sums[(row + r) * part.groups]);
                           Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
                             float* const score = scores + (row + r) * stride + column + v * kLanes;
                             const VI dot = hn::Sub(WholeSum(sums, r * kSumColumns + v * kLanes),
                                                    hn::Mul(zero[v], of_query));
                             const VF x = hn::ConvertTo(DF(), dot);
                             hn::Store(g == 0 ? hn::Mul(x, scale[v])
                                              : hn::MulAdd(x, scale[v], hn::Load(DF(), score)),
                                       DF(), score);
                           });
                         }
                       });
  }
}

// PageValues of rows of probabilities [rows][64].
inline void AmxValues(const KvPageLayout& layout, const std::byte* head, const float* p,
                      int64_t rows, int64_t tokens, AttentionScratch& s, float* out,
                      int64_t out_stride, Ahead ahead) {
  const KvPart& part = layout.v;
  const PageParams params = ReadParams(layout, part, head, s.scales.data(), s.zeros.data());
  const int64_t columns = TiledInputs(part.columns);
  ReadBytes(part, head, 0, RoundUp(tokens, 4), part.columns, columns, s.words.data(), ahead);
  const float* const steps = s.steps.data();
  const int32_t* const zero_sums = s.zero_sums.data();
  for (int64_t g = 0; g < part.groups; ++g) {
    WeightsOfRows(p, rows, params, g, tokens, s);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * kPageTokens;
      SplitCodes(s.weight_codes.data() + at, kPageTokens, s.weight_high.data() + at,
                 s.weight_low.data() + at);
    }
    float* const group_out = out + g * part.group;
    ByteProducts<false>(
        s.weight_high.data(), s.weight_low.data(), kPageTokens, rows,
        s.words.data() + g * part.group, columns, RoundUp(part.group, kLanes), ahead,
        [&](int64_t row, int64_t count, int64_t column, auto vectors, const int32_t* sums)
            FRAMEQUILT_INLINE {
              for (int64_t r = 0; r < count; ++r) {
                const VI zero_sum = hn::Set(DI(), zero_sums[row + r]);
                const VF step = hn::Set(DF(), steps[row + r]);
                Unrolled<decltype(vectors)::value>([&](auto v) FRAMEQUILT_INLINE {
                  float* const c = group_out + (row + r) * out_stride + column + v * kLanes;
                  const VI sum = hn::Sub(WholeSum(sums, r * kSumColumns + v * kLanes), zero_sum);
                  hn::Store(hn::MulAdd(hn::ConvertTo(DF(), sum), step, hn::Load(DF(), c)), DF(), c);
                });
              }
            });
  }
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
