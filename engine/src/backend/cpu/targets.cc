// Choice of a SIMD target. Highway's choice is global to the process, so it is made and undone
// under a lock; the table that comes out holds plain pointers and does not depend on it any more.
#include "src/backend/cpu/targets.h"

#include <cctype>
#include <mutex>

#define FRAMEQUILT_WANT_VNNI 1
#include "src/backend/cpu/disabled_targets.h"

#include "hwy/highway.h"  // after the line above

namespace fq::backend::cpu {

std::vector<Target> simd_targets() {
  std::vector<Target> targets;
  // The lowest bit is the best target.
  for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    const int64_t bit = left & -left;
    if (bit == HWY_SCALAR || bit == HWY_EMU128) continue;
    Target target{hwy::TargetName(bit), bit};
    for (char& c : target.name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    targets.push_back(target);
  }
  return targets;
}

Kernels simd_kernels(const Target& target) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  // A file that is not compiled for the target itself takes the next best one.
  hwy::GetChosenTarget().Update(hwy::SupportedTargets() & ~(target.highway - 1));
  Kernels kernels;
  fill_linear_kernels(kernels);
  fill_planes_linear_kernels(kernels);
  fill_integer_linear_kernels(kernels);
  fill_row_kernels(kernels);
  fill_kv_append_kernels(kernels);
  fill_attention_kernels(kernels);
  fill_encoder_attention_kernels(kernels);
  hwy::GetChosenTarget().DeInit();
  return kernels;
}

}  // namespace fq::backend::cpu
