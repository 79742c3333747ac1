// Float32 linears of the other affine formats: widths of two planes, and 2 bits.

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

void LinearW6(const ops::LinearArgs& args, ThreadPool& pool) {
  RunCodes<PlanesFormat, 6>(args, pool);
}
void LinearW5(const ops::LinearArgs& args, ThreadPool& pool) {
  RunCodes<PlanesFormat, 5>(args, pool);
}
void LinearW3(const ops::LinearArgs& args, ThreadPool& pool) {
  RunCodes<PlanesFormat, 3>(args, pool);
}
void LinearW2(const ops::LinearArgs& args, ThreadPool& pool) {
  RunCodes<PlanesFormat, 2>(args, pool);
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

void fill_planes_linear_kernels(Kernels& kernels) {
  kernels.linear_affine[6] = &HWY_DYNAMIC_DISPATCH(LinearW6);
  kernels.linear_affine[5] = &HWY_DYNAMIC_DISPATCH(LinearW5);
  kernels.linear_affine[3] = &HWY_DYNAMIC_DISPATCH(LinearW3);
  kernels.linear_affine[2] = &HWY_DYNAMIC_DISPATCH(LinearW2);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
