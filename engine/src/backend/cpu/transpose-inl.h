// Rows of floats as columns. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_TRANSPOSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_TRANSPOSE_INL_H_
#undef FRAMEQUILT_CPU_TRANSPOSE_INL_H_
#else
#define FRAMEQUILT_CPU_TRANSPOSE_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "src/backend/cpu/gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// 4 rows of 4.
HWY_INLINE void TransposeSquare(const float* from, int64_t from_stride, float* to,
                                int64_t to_stride) {
  const hn::Full128<float> df;
  const hn::Full128<double> dd;  // pairs of floats
  const auto row = [&](int64_t r)
                       FRAMEQUILT_INLINE { return hn::LoadU(df, from + r * from_stride); };
  const auto a = row(0), b = row(1), c = row(2), d = row(3);
  const auto ab = hn::BitCast(dd, hn::InterleaveLower(df, a, b));
  const auto cd = hn::BitCast(dd, hn::InterleaveLower(df, c, d));
  const auto ab2 = hn::BitCast(dd, hn::InterleaveUpper(df, a, b));
  const auto cd2 = hn::BitCast(dd, hn::InterleaveUpper(df, c, d));
  const auto store = [&](int64_t column, auto pairs) FRAMEQUILT_INLINE {
    hn::StoreU(hn::BitCast(df, pairs), df, to + column * to_stride);
  };
  store(0, hn::InterleaveLower(dd, ab, cd));
  store(1, hn::InterleaveUpper(dd, ab, cd));
  store(2, hn::InterleaveLower(dd, ab2, cd2));
  store(3, hn::InterleaveUpper(dd, ab2, cd2));
}

// to[c * to_stride + r] = from[r * from_stride + c]
inline void Transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                      float* to, int64_t to_stride) {
  constexpr int64_t kSide = 4;
  const auto each = [&](int64_t r, int64_t c)
                        FRAMEQUILT_INLINE { to[c * to_stride + r] = from[r * from_stride + c]; };
  int64_t r = 0;
  for (; r + kSide <= rows; r += kSide) {
    int64_t c = 0;
    for (; c + kSide <= columns; c += kSide)
      TransposeSquare(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    for (; c < columns; ++c) {
      for (int64_t i = 0; i < kSide; ++i) each(r + i, c);
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) each(r, c);
  }
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
