// Choice of a SIMD target. Highway's choice is global to the process, so it is made and undone
// under a lock; the table that comes out holds plain pointers and does not depend on it any more.
#include "src/backend/cpu/targets.h"

#include <unistd.h>

#include <cctype>
#include <mutex>
#include <utility>

#define FRAMEQUILT_WANT_VNNI 1
#include "src/backend/cpu/disabled_targets.h"

#include "hwy/highway.h"  // after the line above

#if HWY_ARCH_ARM_A64 && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif HWY_ARCH_X86
#include <cpuid.h>
#endif
#if FRAMEQUILT_HAVE_AMX_FILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fq::backend::cpu {
namespace {

#if FRAMEQUILT_AVX2_VNNI
void fill_avx_vnni_kernels(Kernels& kernels) {
  avx_vnni::fill_integer_linear_kernels(kernels);
  avx_vnni::fill_attention_kernels(kernels);
  avx_vnni::fill_integer_encoder_attention_kernels(kernels);
}
void fill_avx512_vnni_kernels(Kernels& kernels) {
  avx512_vnni::fill_integer_linear_kernels(kernels);
  avx512_vnni::fill_attention_kernels(kernels);
  avx512_vnni::fill_integer_encoder_attention_kernels(kernels);
}

// The kernels with the dot product of 256 bits in the encoding that this processor has, or null.
// Highway has asked the operating system about the registers of the targets that it supports.
auto avx2_vnni() -> void (*)(Kernels&) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return nullptr;
  const unsigned last_leaf = eax;
  const bool avx512_vnni = (ecx >> 11 & 1) != 0;
  if (last_leaf >= 1) {
    __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
    if ((eax >> 4 & 1) != 0) return &fill_avx_vnni_kernels;
  }
  // Highway's AVX3 includes AVX-512's vectors of 256 bits.
  if (avx512_vnni && (hwy::SupportedTargets() & HWY_AVX3) != 0) return &fill_avx512_vnni_kernels;
  return nullptr;
}
#endif

#if FRAMEQUILT_HAVE_AMX_FILES
// Whether this process may use matrix registers with products of bytes and of bfloat16 numbers.
// Linux allows it to those that ask; the answer is for all threads, for good.
bool may_use_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX_BF16, AMX_TILE, AMX_INT8
  if ((edx & kNeeded) != kNeeded || !__builtin_cpu_supports("avx512bf16")) return false;
  // asm/prctl.h of Linux 5.16 and later.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

void fill_amx_kernels(Kernels& kernels) {
  amx::fill_integer_linear_kernels(kernels);
  amx::fill_bf16dot_linear_kernels(kernels);
  amx::fill_attention_kernels(kernels);
  amx::fill_integer_encoder_attention_kernels(kernels);
}
#endif

#if HWY_ARCH_ARM_A64 && defined(__linux__)
void fill_neon_dot_kernels(Kernels& kernels) {
  neon_dot::fill_integer_linear_kernels(kernels);
  neon_dot::fill_integer_encoder_attention_kernels(kernels);
}
void fill_neon_i8mm_kernels(Kernels& kernels) {
  neon_i8mm::fill_integer_linear_kernels(kernels);
  neon_i8mm::fill_integer_encoder_attention_kernels(kernels);
}
#elif HWY_ARCH_X86
// Zen 4 and 5 add vectors in four units and multiply them in two. Intel's cores do both in the same
// ones.
bool adds_beside_multiplying() { return __builtin_cpu_is("amd") != 0; }

void fill_zen4_kernels(Kernels& kernels) {
  fill_bf16dot_linear_kernels(kernels);
  fold::fill_winograd_linear_kernels(kernels);
  fold::fill_integer_encoder_attention_kernels(kernels);
}
#endif

// Best first: the extensions of the machine that add targets to Highway's target `bit`. `best`:
// Highway has no better one here.
std::vector<Target> extended_targets([[maybe_unused]] int64_t bit, [[maybe_unused]] bool best) {
  std::vector<Target> targets;
#if FRAMEQUILT_AVX2_VNNI
  if (bit == HWY_AVX2) {
    if (const auto fill = avx2_vnni(); fill != nullptr) targets.push_back({"avx2_vnni", bit, fill});
  }
#endif
#if HWY_ARCH_ARM_A64 && defined(__linux__)
  if (!best) return targets;
  const bool dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  const bool i8mm = (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
  if (i8mm) targets.push_back({"neon_i8mm", bit, &fill_neon_i8mm_kernels});
  if (dot) targets.push_back({"neon_dot", bit, &fill_neon_dot_kernels});
#elif HWY_ARCH_X86
#if FRAMEQUILT_HAVE_AMX_FILES
  if (bit == HWY_AVX3_DL && may_use_amx()) targets.push_back({"avx3_amx", bit, &fill_amx_kernels});
#endif
  if (bit == HWY_AVX3_DL && __builtin_cpu_supports("avx512bf16")) {
    if (adds_beside_multiplying()) {
      targets.push_back({"avx3_zen4", bit, &fill_zen4_kernels});
    } else {
      targets.push_back({"avx3_bf16", bit, &fill_bf16dot_linear_kernels});
    }
  }
#endif
  return targets;
}

}  // namespace

std::vector<Target> simd_targets() {
  std::vector<Target> targets;
  // The lowest bit is the best target.
  for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    const int64_t bit = left & -left;
    if (bit == HWY_SCALAR || bit == HWY_EMU128) continue;
    for (Target& extended : extended_targets(bit, targets.empty()))
      targets.push_back(std::move(extended));
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
  fill_integer_encoder_attention_kernels(kernels);
  if (target.fill_extension != nullptr) target.fill_extension(kernels);
  hwy::GetChosenTarget().DeInit();
  return kernels;
}

int64_t first_cache_bytes() {
  static const int64_t bytes = [] {
    long told = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    told = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return told > 0 ? int64_t{told} : int64_t{32} << 10;
  }();
  return bytes;
}

}  // namespace fq::backend::cpu
