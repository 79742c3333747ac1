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

// ops::exp_f32, the same bits. kUpToZero: for arguments that are never above 0 (or are NaN), as in
// a softmax. n is taken from the low bits of the sum that rounds it, and goes into the exponent by
// an integer addition: exact, because 2^n y is a normal number wherever neither end is taken.
template <bool kUpToZero = false>
HWY_INLINE VF Exp(VF x) {
  const DF df;
  const hn::Rebind<int32_t, DF> di;
  const VF low = hn::Set(df, Constants::kExpLow), high = hn::Set(df, Constants::kExpHigh);
  VF inside = hn::Max(x, low);
  if constexpr (!kUpToZero) inside = hn::Min(inside, high);
  const VF shift = hn::Set(df, Constants::kRoundShift);
  const VF rounded = hn::MulAdd(inside, hn::Set(df, Constants::kLog2E), shift);
  const VF n = hn::Sub(rounded, shift);
  VF r = hn::MulAdd(n, hn::Set(df, -Constants::kLn2High), inside);
  r = hn::MulAdd(n, hn::Set(df, -Constants::kLn2Low), r);
  VF q = hn::MulAdd(hn::Set(df, Constants::kExp4), r, hn::Set(df, Constants::kExp3));
  q = hn::MulAdd(q, r, hn::Set(df, Constants::kExp2));
  q = hn::MulAdd(q, r, hn::Set(df, Constants::kExp1));
  q = hn::MulAdd(q, r, hn::Set(df, Constants::kExp0));
  const VF y = hn::Add(hn::MulAdd(hn::Mul(r, r), q, r), hn::Set(df, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, rounded));
  VF result = hn::BitCast(df, hn::Add(hn::BitCast(di, y), exponent));
  result = hn::IfThenZeroElse(hn::Lt(x, low), result);
  if constexpr (kUpToZero) return result;
  // At `high` itself the result rounds to infinity.
  return hn::IfThenElse(hn::Ge(x, high), hn::Set(df, std::numeric_limits<float>::infinity()),
                        result);
}

// Integers nearest to numbers of less than 2^22, half to even: the sum that rounds a number has its
// integer in the low bits.
struct Rounding {
  VF shifted;

  HWY_INLINE explicit Rounding(VF x) : shifted(hn::Add(x, Shift())) {}
  HWY_INLINE VI Integer() const {
    constexpr int32_t kBits = 0x4B400000;  // of kRoundShift
    const hn::Rebind<int32_t, DF> di;
    return hn::Sub(hn::BitCast(di, shifted), hn::Set(di, kBits));
  }
  HWY_INLINE VF Float() const { return hn::Sub(shifted, Shift()); }

 private:
  static HWY_INLINE VF Shift() { return hn::Set(DF(), Constants::kRoundShift); }
};

// round(x / divisor), half to even, the bits of a division: its quotient is rounded to float32
// first. Division is what a vector unit does slowest, so the nearest integer to x times the inverse
// is taken where no quotient is near a tie. |x / divisor| has to be less than 2^22; where it is
// above `most`, the integer may be another one that is.
class RoundedQuotient {
 public:
  RoundedQuotient(float divisor, float most)
      : divisor_(hn::Set(DF(), divisor)),
        // The inverse of a larger divisor is not a normal number: NaN then, and always a division.
        inverse_(hn::Set(
            DF(), divisor < 1e37f ? 1.0f / divisor : std::numeric_limits<float>::quiet_NaN())),
        // Three roundings, of 2^-24 each, lie between the two quotients.
        sure_(hn::Set(DF(), 0.5f - (most + 1.0f) * 0x1p-22f)) {}

  HWY_INLINE VI operator()(VF x) const {
    VI rounded[1];
    Of({x}, rounded);
    return rounded[0];
  }

  // Of several vectors, with one test for all of them.
  template <int kVectors>
  HWY_INLINE void Of(const VF (&x)[kVectors], VI (&rounded)[kVectors]) const {
    VF farthest = hn::Zero(DF());
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      const VF quotient = hn::Mul(x[v], inverse_);
      const Rounding nearest(quotient);
      const VF distance = hn::Abs(hn::Sub(quotient, nearest.Float()));
      // Without a normal inverse all are NaN, so that none gets lost.
      farthest = v == 0 ? distance : hn::Max(farthest, distance);
      rounded[v] = nearest.Integer();
    });
    if (hn::AllTrue(DF(), hn::Lt(farthest, sure_))) [[likely]]
      return;
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      rounded[v] = Rounding(hn::Div(x[v], divisor_)).Integer();
    });
  }

 private:
  VF divisor_, inverse_, sure_;
};

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
