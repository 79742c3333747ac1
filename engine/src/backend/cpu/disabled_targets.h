// The targets that this backend does not compile for: SSSE3 (its machines have SSE4 in practice)
// and SVE (NEON serves those). Every file that uses Highway includes this first.
#pragma once

// Files whose kernels gain from the 4-way integer dot product define this first: they are compiled
// for one target more. The others serve that target with their next best.
#ifdef FRAMEQUILT_WANT_VNNI
#define HWY_WANT_AVX3_DL 1
#endif

// AVX2 alone: for the files of its extensions, and for sanitizers, which multiply the time that
// kernels take to compile (one target then stands for all of them, the templates are the same).
#if defined(FRAMEQUILT_AVX2_DOT)
#define FRAMEQUILT_ONE_TARGET 1
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FRAMEQUILT_ONE_TARGET 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define FRAMEQUILT_ONE_TARGET 1
#endif
#endif

#ifndef HWY_DISABLED_TARGETS
#if (FRAMEQUILT_AMX || FRAMEQUILT_FOLD) && !defined(FRAMEQUILT_ONE_TARGET)
// AVX-512 with VNNI alone: for the files of its extensions.
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#elif defined(FRAMEQUILT_ONE_TARGET)
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#else
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#endif
#endif
