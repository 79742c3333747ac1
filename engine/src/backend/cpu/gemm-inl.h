// The register-blocked inner product that linears and attention share: C[r][j] += sum over k
// ascending of fma(A[r][k], B[k][j]). Each output has one accumulator, so splitting k and storing
// it in between changes nothing. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_GEMM_INL_H_
#undef FRAMEQUILT_CPU_GEMM_INL_H_
#else
#define FRAMEQUILT_CPU_GEMM_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// One-lane targets, and those whose width is not known to the compiler, run the references instead.
#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128 && !HWY_HAVE_SCALABLE
#undef FRAMEQUILT_HAVE_SIMD
#define FRAMEQUILT_HAVE_SIMD 1

// At most 16 lanes: a unit is half a tile, a tile or two tiles of output rows.
using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// Accumulators that fit the register file beside the operands.
constexpr bool kManyRegisters = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;
constexpr int kMaxAccumulators = kManyRegisters ? 24 : 12;
constexpr int kMicroRows = kMaxAccumulators / 2;  // with two vectors of columns

#define FRAMEQUILT_INLINE HWY_ATTR __attribute__((always_inline))

// Calls f(integral_constant<0>), ..., f(integral_constant<kCount - 1>): indices of register arrays
// must be constants.
template <int kCount, class F>
HWY_INLINE void Unrolled(const F& f) {
  [&]<int... kI>(std::integer_sequence<int, kI...>) FRAMEQUILT_INLINE {
    (f(std::integral_constant<int, kI>()), ...);
  }
  (std::make_integer_sequence<int, kCount>());
}

using DU = hn::Rebind<uint32_t, DF>;
using VU = hn::Vec<DU>;
using DI = hn::Rebind<int32_t, DF>;
using VI = hn::Vec<DI>;

// Codes become floats without a conversion: with exponent bits OR-ed in, a code at bits p.. of the
// mantissa is the float 2^(23-p) + code, and subtracting 2^(23-p) + zero is exact. Code bits
// [kShift, kShift + kBits) of a word as the float (code - zero), where minus = 2^(23-kShift) +
// zero.
template <int kBits, int kShift>
HWY_INLINE VF CodeMinusZero(VU word, VF minus) {
  const DU du;
  static_assert(kShift + kBits <= 23);
  constexpr uint32_t kMask = ((1u << kBits) - 1) << kShift;
  constexpr uint32_t kExponent = (127u + 23u - kShift) << 23;
  const VU bits = hn::OrAnd(hn::Set(du, kExponent), word, hn::Set(du, kMask));
  return hn::Sub(hn::BitCast(DF(), bits), minus);
}

constexpr float CodeBase(int shift) { return static_cast<float>(1 << (23 - shift)); }

struct GemmBlock {
  const float* a = nullptr;  // [rows, k]
  int64_t a_stride = 0;
  const float* b = nullptr;  // [k, columns], aligned to vectors
  int64_t b_stride = 0;
  float* c = nullptr;  // [rows, columns], aligned to vectors
  int64_t c_stride = 0;
  int64_t k = 0;
  bool first = false;  // start from 0 instead of from c
};

template <int kRows, int kVectors>
HWY_NOINLINE void MicroKernel(const GemmBlock& g) {
  const DF df;
  VF acc[kRows * kVectors];
  if (g.first) {
    Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE { acc[i] = hn::Zero(df); });
  } else {
    Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE {
      acc[i] = hn::Load(df, g.c + i / kVectors * g.c_stride + i % kVectors * kLanes);
    });
  }
  const float* HWY_RESTRICT a = g.a;
  const float* HWY_RESTRICT b = g.b;
  const int64_t a_stride = g.a_stride;
  for (int64_t k = 0; k < g.k; ++k, b += g.b_stride) {
    VF columns[kVectors];
    Unrolled<kVectors>([&](auto v)
                           FRAMEQUILT_INLINE { columns[v] = hn::Load(df, b + v * kLanes); });
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
      const VF value = hn::Set(df, a[r * a_stride + k]);
      Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
        acc[r * kVectors + v] = hn::MulAdd(value, columns[v], acc[r * kVectors + v]);
      });
    });
  }
  Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE {
    hn::Store(acc[i], df, g.c + i / kVectors * g.c_stride + i % kVectors * kLanes);
  });
}

using MicroFn = void (*)(const GemmBlock&);

// Kernels for 1..kMaxAccumulators/kVectors rows.
template <int kVectors, int... kI>
constexpr std::array<MicroFn, sizeof...(kI)> MakeMicroKernels(std::integer_sequence<int, kI...>) {
  return {&MicroKernel<kI + 1, kVectors>...};
}
template <int kVectors>
constexpr auto kMicroKernels =
    MakeMicroKernels<kVectors>(std::make_integer_sequence<int, kMaxAccumulators / kVectors>());

// Calls run(begin, count) for `rows` rows in tiles of at most `most`, as even as possible.
template <class Run>
HWY_INLINE void ForTiles(int64_t rows, int64_t most, const Run& run) {
  if (rows <= 0) return;
  const int64_t tiles = (rows + most - 1) / most, least = rows / tiles, larger = rows % tiles;
  int64_t begin = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t count = least + (tile < larger);
    run(begin, count);
    begin += count;
  }
}

// All `rows` of a panel of kVectors vectors: before(begin, count) and after(begin, count) are
// called around the rows of each tile.
template <int kVectors, class Before, class After>
inline void GemmPanel(const GemmBlock& g, int64_t rows, const Before& before, const After& after) {
  ForTiles(rows, kMaxAccumulators / kVectors, [&](int64_t begin, int64_t count) FRAMEQUILT_INLINE {
    before(begin, count);
    GemmBlock part = g;
    part.a += begin * g.a_stride;
    part.c += begin * g.c_stride;
    kMicroKernels<kVectors>[static_cast<size_t>(count - 1)](part);
    after(begin, count);
  });
}

template <int kVectors>
inline void GemmPanel(const GemmBlock& g, int64_t rows) {
  const auto nothing = [](int64_t, int64_t) {};
  GemmPanel<kVectors>(g, rows, nothing, nothing);
}

// `columns` a multiple of kLanes. Few rows take wide panels, so that enough accumulators are in
// flight.
inline void Gemm(GemmBlock g, int64_t rows, int64_t columns) {
  int64_t vectors = columns / kLanes;
  const auto run = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
    GemmPanel<kVectors>(g, rows);
    g.b += kVectors * kLanes;
    g.c += kVectors * kLanes;
    vectors -= kVectors;
  };
  if (rows <= kMaxAccumulators / 4) {
    while (vectors >= 4) run(std::integral_constant<int, 4>());
  }
  while (vectors >= 2) run(std::integral_constant<int, 2>());
  if (vectors > 0) run(std::integral_constant<int, 1>());
}

#else
#undef FRAMEQUILT_HAVE_SIMD
#define FRAMEQUILT_HAVE_SIMD 0
#endif

}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
