// What the kernel tests share: targets, stress values, comparison with a derived bound.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "src/backend/backend.h"

namespace fq::backend {

inline constexpr double kUnit = 0x1p-24;  // half an ulp of 1 in float32

inline std::unique_ptr<const Backend> backend_of(const std::string& target) {
  auto backend = make_cpu_backend(target);
  EXPECT_TRUE(backend) << (backend ? "" : backend.error().to_string());
  return std::move(*backend);
}

// Targets without a fused multiply-add round twice: their results are near the reference, not equal
// to it.
inline bool has_fma(const std::string& target) {
  return target != "sse4" && target != "ssse3" && target != "sse2";
}

inline std::vector<std::string> simd_target_names() {
  std::vector<std::string> names = cpu_targets();
  std::erase(names, "scalar");
  return names;
}

// Kernels keep their memory for the next call of the same thread. A call from a thread of its own
// finds no room that another test has made: what it needs, it has to reserve.
template <class Call>
void on_new_thread(Call&& call) {
  std::thread(std::forward<Call>(call)).join();
}

// Normal values with some zeros, tiny values (subnormal products) and outliers.
inline std::vector<float> stress_values(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) {
    value = normal(random);
    switch (random() % 32) {
      case 0:
        value = 0.0f;
        break;
      case 1:
        value = -0.0f;
        break;
      case 2:
        value *= 1e-38f;
        break;
      case 3:
        value *= 50.0f;
        break;
      default:
        break;
    }
  }
  return values;
}

inline std::vector<float> normal_values(size_t count, uint32_t seed, float deviation = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Index of the first difference in bits, or -1.
inline int64_t first_difference(const float* a, const float* b, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i, b + i, sizeof(float)) != 0) return static_cast<int64_t>(i);
  }
  return -1;
}

#define EXPECT_SAME_BITS(a, b)                                                              \
  do {                                                                                      \
    ASSERT_EQ((a).size(), (b).size());                                                      \
    const int64_t at = ::fq::backend::first_difference((a).data(), (b).data(), (a).size()); \
    EXPECT_EQ(at, -1) << "element " << at << ": "                                           \
                      << (at < 0 ? 0.0f : (a)[static_cast<size_t>(at)]) << " and "          \
                      << (at < 0 ? 0.0f : (b)[static_cast<size_t>(at)]);                    \
  } while (0)

}  // namespace fq::backend
