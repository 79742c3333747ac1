// What this machine can do at most: memory read bandwidth, and multiply-add peaks in float32 and
// int8 from registers. Prints one JSON object. Compiled for the machine that builds it
// (-march=native), unlike everything else here.
//
//     limits [THREADS] [RUNS]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

// Vectors as wide as the target has them.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef uint64_t Words __attribute__((vector_size(kBytes)));
typedef float Floats __attribute__((vector_size(kBytes)));

volatile uint64_t sink;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double on_all_threads(int threads, const std::function<void(int)>& work) {
  const double start = seconds();
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work, i);
  work(0);
  for (std::thread& helper : helpers) helper.join();
  return seconds() - start;
}

uint64_t read_all(const std::byte* data, size_t bytes) {
  Words sums[8] = {};
  for (size_t i = 0; i + 8 * kBytes <= bytes; i += 8 * kBytes) {
    const Words* words = reinterpret_cast<const Words*>(data + i);
    for (int j = 0; j < 8; ++j) sums[j] ^= words[j];
  }
  for (int j = 1; j < 8; ++j) sums[0] ^= sums[j];
  return sums[0][0] ^ sums[0][1];
}

// Independent accumulators, so that neither latency nor memory counts; an empty asm keeps the
// compiler from folding the loop.
constexpr int kChains = 12;

float float_work(int64_t rounds) {
  const Floats x = Floats{} + 1.0000001f, y = Floats{} + 1e-9f;
  Floats sums[kChains];
  for (Floats& sum : sums) sum = x;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      sums[j] = sums[j] * x + y;
#if defined(__x86_64__)
      __asm__ volatile("" : "+v"(sums[j]));
#else
      __asm__ volatile("" : "+w"(sums[j]));
#endif
    }
  }
  for (int j = 1; j < kChains; ++j) sums[0] += sums[j];
  return sums[0][0];
}

// Exact 4-way dot products of bytes into int32: what a kernel can use without overflow.
#if defined(__AVX512VNNI__)
constexpr const char* kDotName = "avx512 vpdpbusd";
int int8_work(int64_t rounds) {
  __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(2);
  __m512i sums[kChains];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      sums[j] = _mm512_dpbusd_epi32(sums[j], x, y);
      __asm__ volatile("" : "+v"(sums[j]));
    }
  }
  for (int j = 1; j < kChains; ++j) sums[0] = _mm512_add_epi32(sums[0], sums[j]);
  alignas(64) int out[16];
  _mm512_store_si512(out, sums[0]);
  return out[0];
}
#elif defined(__AVX2__)
constexpr const char* kDotName = "avx2 vpmaddubsw + vpmaddwd + vpaddd";
int int8_work(int64_t rounds) {
  __m256i x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1);
  __m256i sums[kChains];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      __asm__ volatile("" : "+v"(x));
      __m256i pairs = _mm256_maddubs_epi16(x, y);
      __asm__ volatile("" : "+v"(pairs));
      sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(pairs, ones));
      __asm__ volatile("" : "+v"(sums[j]));
    }
  }
  for (int j = 1; j < kChains; ++j) sums[0] = _mm256_add_epi32(sums[0], sums[j]);
  return _mm256_extract_epi32(sums[0], 0);
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr const char* kDotName = "neon sdot";
int int8_work(int64_t rounds) {
  const int8x16_t x = vdupq_n_s8(3), y = vdupq_n_s8(2);
  int32x4_t sums[kChains];
  for (int32x4_t& sum : sums) sum = vdupq_n_s32(0);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      sums[j] = vdotq_s32(sums[j], x, y);
      __asm__ volatile("" : "+w"(sums[j]));
    }
  }
  for (int j = 1; j < kChains; ++j) sums[0] = vaddq_s32(sums[0], sums[j]);
  return vaddvq_s32(sums[0]);
}
#else
constexpr const char* kDotName = "";
int int8_work(int64_t) { return 0; }
#endif

void print(const char* name, std::vector<double> samples, const char* end) {
  std::sort(samples.begin(), samples.end());
  std::printf("\"%s\": {\"median\": %.2f, \"min\": %.2f, \"max\": %.2f}%s", name,
              samples[samples.size() / 2], samples.front(), samples.back(), end);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads =
      argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  const int runs = argc > 2 ? std::atoi(argv[2]) : 5;
  if (threads < 1 || runs < 1) {
    std::fprintf(stderr, "usage: limits [THREADS] [RUNS]\n");
    return 2;
  }
  // Far larger than any cache, written once so that every page exists.
  const size_t bytes = size_t{512} << 20, part = bytes / static_cast<size_t>(threads) / 4096 * 4096;
  std::byte* data = static_cast<std::byte*>(std::aligned_alloc(4096, bytes));
  if (data == nullptr) return 1;
  on_all_threads(threads, [&](int i) {
    std::fill_n(data + static_cast<size_t>(i) * part, part, std::byte{1});
  });
  const int64_t rounds = 30'000'000;
  std::vector<double> read, floats, ints;
  std::vector<uint64_t> results(static_cast<size_t>(threads));
  for (int run = 0; run < runs; ++run) {
    double wall = on_all_threads(threads, [&](int i) {
      results[static_cast<size_t>(i)] = read_all(data + static_cast<size_t>(i) * part, part);
    });
    read.push_back(1e-9 * static_cast<double>(part) * threads / wall);
    wall = on_all_threads(threads, [&](int i) {
      results[static_cast<size_t>(i)] += static_cast<uint64_t>(float_work(rounds));
    });
    const double lanes = kBytes / 4.0, steps = 1e-9 * static_cast<double>(rounds) * kChains;
    floats.push_back(steps * 2.0 * lanes * threads / wall);
    wall = on_all_threads(threads, [&](int i) {
      results[static_cast<size_t>(i)] += static_cast<uint64_t>(int8_work(rounds));
    });
    ints.push_back(kDotName[0] == '\0' ? 0.0 : steps * 2.0 * kBytes * threads / wall);
    for (uint64_t result : results) sink = sink + result;
  }
  std::free(data);
  std::printf("{\"threads\": %d, ", threads);
  print("read_gbytes_per_s", read, ", ");
  print("float_gflops", floats, ", ");
  print("int8_gops", ints, ", ");
  std::printf("\"int8_instruction\": \"%s\"}\n", kDotName);
  return 0;
}
