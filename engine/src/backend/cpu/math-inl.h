// Vector forms of ops/math.h: the same operations in the same order. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_MATH_INL_H_
#undef FRAMEQUILT_CPU_MATH_INL_H_
#else
#define FRAMEQUILT_CPU_MATH_INL_H_
#endif

#include <limits>

#include "hwy/highway.h"
#include "src/backend/cpu/gemm-inl.h"
#include "src/ops/math.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

using ops::kSumLanes;
using Constants = ops::MathConstants;

HWY_INLINE VF Exp(VF x) {
  const DF df;
  const hn::Rebind<int32_t, DF> di;
  const VF low = hn::Set(df, Constants::kExpLow), high = hn::Set(df, Constants::kExpHigh);
  const VF inside = hn::Min(hn::Max(x, low), high);
  const VF shift = hn::Set(df, Constants::kRoundShift);
  const VF n = hn::Sub(hn::MulAdd(inside, hn::Set(df, Constants::kLog2E), shift), shift);
  VF r = hn::MulAdd(n, hn::Set(df, -Constants::kLn2High), inside);
  r = hn::MulAdd(n, hn::Set(df, -Constants::kLn2Low), r);
  VF q = hn::MulAdd(hn::Set(df, Constants::kExp4), r, hn::Set(df, Constants::kExp3));
  q = hn::MulAdd(q, r, hn::Set(df, Constants::kExp2));
  q = hn::MulAdd(q, r, hn::Set(df, Constants::kExp1));
  q = hn::MulAdd(q, r, hn::Set(df, Constants::kExp0));
  const VF y = hn::Add(hn::MulAdd(hn::Mul(r, r), q, r), hn::Set(df, 1.0f));
  const auto whole = hn::ConvertTo(di, n);
  const auto half = hn::ShiftRight<1>(whole);
  const auto bias = hn::Set(di, 127);
  const VF a = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(half, bias)));
  const VF b = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(hn::Sub(whole, half), bias)));
  VF result = hn::Mul(hn::Mul(y, a), b);
  result = hn::IfThenZeroElse(hn::Lt(x, low), result);
  return hn::IfThenElse(hn::Gt(x, high), hn::Set(df, std::numeric_limits<float>::infinity()),
                        result);
}

HWY_INLINE VF Relu(VF x) { return hn::Max(x, hn::Zero(DF())); }

HWY_INLINE VF Silu(VF x) { return hn::Div(x, hn::Add(hn::Set(DF(), 1.0f), Exp(hn::Neg(x)))); }

HWY_INLINE VF Gelu(VF x) {
  const DF df;
  const VF one = hn::Set(df, 1.0f);
  const VF z = hn::Abs(x);
  const VF t = hn::Div(one, hn::MulAdd(hn::Set(df, Constants::kTailStep), z, one));
  VF p = hn::Set(df, Constants::kTail[8]);
  for (int i = 7; i >= 0; --i) p = hn::MulAdd(p, t, hn::Set(df, Constants::kTail[i]));
  const VF tail = hn::Mul(Exp(hn::Mul(hn::Set(df, -0.5f), hn::Mul(z, z))), hn::Mul(p, t));
  return hn::Mul(x, hn::IfThenElse(hn::Ge(x, hn::Zero(df)), hn::Sub(one, tail), tail));
}

HWY_INLINE VF GeluTanh(VF x) {
  const DF df;
  const VF inner = hn::MulAdd(hn::Mul(hn::Set(df, Constants::kGeluTanhCube), hn::Mul(x, x)), x, x);
  const VF e = Exp(hn::Neg(hn::Mul(hn::Set(df, Constants::kGeluTanhScale), inner)));
  return hn::Div(x, hn::Add(hn::Set(df, 1.0f), e));
}

// 16 interleaved partial sums, whatever the vector width.
struct LaneSums {
  static constexpr int kParts = kSumLanes / kLanes;
  VF parts[kParts];

  HWY_INLINE LaneSums() {
    Unrolled<kParts>([&](auto i) FRAMEQUILT_INLINE { parts[i] = hn::Zero(DF()); });
  }
  HWY_INLINE void Store(float* lanes) const {
    Unrolled<kParts>([&](auto i)
                         FRAMEQUILT_INLINE { hn::StoreU(parts[i], DF(), lanes + i * kLanes); });
  }
};

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
