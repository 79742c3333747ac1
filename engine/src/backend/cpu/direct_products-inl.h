// The products of code_products-inl.h for few rows, straight from the codes of a page: words that
// only so many rows read are made in registers, not written first. The same integers. Included once
// per SIMD target.
#if defined(FRAMEQUILT_CPU_DIRECT_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_DIRECT_PRODUCTS_INL_H_
#undef FRAMEQUILT_CPU_DIRECT_PRODUCTS_INL_H_
#else
#define FRAMEQUILT_CPU_DIRECT_PRODUCTS_INL_H_
#endif

#include <array>
#include <cstring>
#include <utility>

#include "hwy/highway.h"
#include "src/backend/cpu/code_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {

#undef FRAMEQUILT_HAVE_DIRECT
#if HWY_TARGET == HWY_AVX3_DL  // has the permutation of bytes, and registers for 8 rows
#define FRAMEQUILT_HAVE_DIRECT 1
inline namespace FRAMEQUILT_DOT_NAMESPACE {

constexpr int64_t kDirectMostRows = 8;
constexpr int64_t kDirectColumns = 4 * kLanes;
constexpr int kDirectRows = 8;  // groups of so many begin and end with a unit, of any bits
template <int kRows>
constexpr int kDirectVectors = kRows <= 4 ? 4 : 2;

// Whether these kernels multiply so many columns of codes with so many rows.
inline bool IsDirect(int64_t rows, int64_t columns) {
  return rows <= kDirectMostRows && columns % kDirectColumns == 0;
}

// Words of a unit of rows of codes, kLanes columns in each vector.
template <int kBits, int kVectors>
struct DirectWords {
  static constexpr int kWords = CodeUnit<kBits>::kRows / 2;  // of each column
  CodeUnit<kBits> units[kVectors];

  HWY_INLINE void Load(const typename CodeUnit<kBits>::Place& place) {
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE { units[v].Load(place, v * kLanes); });
  }
  template <int kWord>
  HWY_INLINE void Cut(VU (&words)[kVectors]) const {
    Unrolled<kVectors>([&](auto v)
                           FRAMEQUILT_INLINE { words[v] = units[v].template Pair<kWord>(); });
  }
};

// Codes of 8 bits lie in two rows of bytes: an instruction puts bytes of both into their places.
template <int kVectors>
struct DirectWords<8, kVectors> {
  static constexpr int kWords = 1;
  VU places[kVectors];
  __m512i first, second;

  // Of the word of column i: byte 0 is byte i of the first row, byte 2 that of the second one.
  HWY_INLINE DirectWords() {
    const DU du;
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      const VU column = hn::Iota(du, uint32_t{v * kLanes});
      places[v] = hn::Or(column, hn::Or(hn::ShiftLeft<16>(column), hn::Set(du, 64u << 16)));
    });
  }
  HWY_INLINE void Load(const CodeUnit<8>::Place& place) {
    first = Bytes(place.low);
    second = Bytes(place.low + place.columns);
  }
  template <int kWord>
  HWY_INLINE void Cut(VU (&words)[kVectors]) const {
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      constexpr __mmask64 kBytes = 0x5555555555555555u;
      words[v] = VU{_mm512_maskz_permutex2var_epi8(kBytes, first, places[v].raw, second)};
    });
  }

 private:
  static HWY_INLINE __m512i Bytes(const uint8_t* from) {
    if constexpr (kVectors == 4) return _mm512_loadu_si512(from);
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
};

// As CodeKernel, with codes in place of x.products.b. Steps behind the last one, up to a whole
// unit, multiply with words that are 0.
template <class X, int kBits, int kRows>
HWY_NOINLINE void DirectKernel(X& x, typename CodeUnit<kBits>::Place place) {
  constexpr int kVectors = kDirectVectors<kRows>;
  DirectWords<kBits, kVectors> codes;
  constexpr int kWords = codes.kWords;
  VI acc[kRows * kVectors];
  StartSums<kRows, kVectors>(x, acc);
  Ahead ahead = x.ahead;
  const uint32_t* HWY_RESTRICT a = x.products.a;
  const int64_t a_row = x.products.a_row;
  for (int64_t step = 0; step < x.products.steps; step += kWords, a += kWords) {
    ahead.Ask(kWords * kLinesOfStep<kVectors>);
    codes.Load(place);
    place.NextUnit();
    Unrolled<kWords>([&](auto w) FRAMEQUILT_INLINE {
      VU words[kVectors];
      codes.template Cut<w>(words);
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        AddPairDots(words, a + w + r * a_row, acc + r * kVectors);
      });
    });
  }
  x.ahead = ahead;
  FinishSums<kRows, kVectors>(x, acc);
}

template <class X, int kBits, int... kI>
constexpr std::array<void (*)(X&, typename CodeUnit<kBits>::Place), sizeof...(kI)>
MakeDirectKernels(std::integer_sequence<int, kI...>) {
  return {&DirectKernel<X, kBits, kI + 1>...};
}
template <class X, int kBits>
constexpr auto kDirectKernels =
    MakeDirectKernels<X, kBits>(std::make_integer_sequence<int, kDirectMostRows>());

// As CodeProducts, of `columns` columns of codes that begin at (row, column). `row` begins a unit
// of any number of bits.
template <class X>
void DirectProducts(X& whole, int64_t rows, int64_t columns, const KvPart& part,
                    const std::byte* head, int64_t row, int64_t column) {
  X x = whole;
  const int64_t step = kLanes * (rows <= 4 ? kDirectVectors<4> : kDirectVectors<5>);
  WithBits(part.bits, [&](auto bits) {
    for (int64_t c = 0; c < columns; c += step) {
      kDirectKernels<X, bits>[static_cast<size_t>(rows - 1)](x, {part, head, row, column + c});
      x.NextColumns(step);
    }
  });
  whole.ahead = x.ahead;
}

}  // namespace FRAMEQUILT_DOT_NAMESPACE
#else
#define FRAMEQUILT_HAVE_DIRECT 0
#endif

}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
