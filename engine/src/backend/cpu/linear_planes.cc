// Float32 linears of the other affine formats: widths of two planes, 2 bits, and offsets.

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/linear_planes.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/linear-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

template <int kBits>
void LinearPlanes(const ops::LinearArgs& args, ThreadPool& pool) {
  if (args.w->offsets != nullptr) return RunLinearSmall<PlanesFormat<kBits, true>>(args, pool);
  RunLinear<PlanesFormat<kBits, false>>(args, pool);
}
void LinearW6(const ops::LinearArgs& args, ThreadPool& pool) { LinearPlanes<6>(args, pool); }
void LinearW5(const ops::LinearArgs& args, ThreadPool& pool) { LinearPlanes<5>(args, pool); }
void LinearW3(const ops::LinearArgs& args, ThreadPool& pool) { LinearPlanes<3>(args, pool); }
void LinearW2(const ops::LinearArgs& args, ThreadPool& pool) { LinearPlanes<2>(args, pool); }
void LinearW8Offset(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinearSmall<AffineFormat<8, true>>(args, pool);
}
void LinearW4Offset(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinearSmall<AffineFormat<4, true>>(args, pool);
}

#else  // one-lane targets: never chosen, see simd_targets()

void LinearW6(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearW5(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearW3(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearW2(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearW8Offset(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearW4Offset(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(LinearW6);
HWY_EXPORT(LinearW5);
HWY_EXPORT(LinearW3);
HWY_EXPORT(LinearW2);
HWY_EXPORT(LinearW8Offset);
HWY_EXPORT(LinearW4Offset);

void fill_planes_linear_kernels(Kernels& kernels) {
  kernels.linear_affine[6] = &HWY_DYNAMIC_DISPATCH(LinearW6);
  kernels.linear_affine[5] = &HWY_DYNAMIC_DISPATCH(LinearW5);
  kernels.linear_affine[3] = &HWY_DYNAMIC_DISPATCH(LinearW3);
  kernels.linear_affine[2] = &HWY_DYNAMIC_DISPATCH(LinearW2);
  kernels.linear_offset8 = &HWY_DYNAMIC_DISPATCH(LinearW8Offset);
  kernels.linear_offset4 = &HWY_DYNAMIC_DISPATCH(LinearW4Offset);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
