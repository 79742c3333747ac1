// Which SIMD targets this build and machine have.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/backend/cpu/kernels.h"

namespace fq::backend::cpu {

inline constexpr int kMaxHeadDim = 512;

struct Target {
  std::string name;     // lower case: "avx2"
  int64_t highway = 0;  // its bit in Highway
  // Kernels in place of those that Highway's target has, for extensions that it does not know as
  // targets.
  void (*fill_extension)(Kernels& kernels) = nullptr;
};

// Best first; without the one-lane fallback, whose place the references take.
std::vector<Target> simd_targets();

// The kernels of one of simd_targets(). Any thread.
Kernels simd_kernels(const Target& target);

// Bytes of a core's first cache level for data, 32 KiB where the system does not say. Any thread.
int64_t first_cache_bytes();

}  // namespace fq::backend::cpu
