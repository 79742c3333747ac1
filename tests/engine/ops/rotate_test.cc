// The Hadamard rotation: orthogonal, its own inverse, the matrix of its definition, any threads.
#include "src/ops/rotate.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

namespace fq::ops {
namespace {

std::vector<float> normal_values(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

TEST(Rotate, EqualsTheMatrixBlockByBlock) {
  ThreadPool pool(2);
  for (const int dims : {1, 7, 24, 64, 72, 80, 96, 128, 256}) {
    const int heads = 3, block = rotation_block(dims);
    EXPECT_EQ(dims % block, 0);
    EXPECT_TRUE(std::has_single_bit(static_cast<unsigned>(block)));
    const size_t width = static_cast<size_t>(heads * dims), stride = width + 3;
    const auto x = normal_values(20 * stride, 5);
    std::vector<float> y = x;
    rotate_heads(y.data(), static_cast<int64_t>(stride), 20, heads, dims, pool);
    for (size_t row = 0; row < 20; ++row) {
      for (size_t i = 0; i < width; ++i) {
        const size_t begin = i / static_cast<size_t>(block) * static_cast<size_t>(block);
        double want = 0, size = 0;
        for (size_t j = 0; j < static_cast<size_t>(block); ++j) {
          // Entry (i, j) of the matrix is -1 to the number of common bits (Sylvester).
          const double sign = std::popcount((i - begin) & j) % 2 == 0 ? 1.0 : -1.0;
          want += sign * x[row * stride + begin + j];
          size += std::fabs(x[row * stride + begin + j]);
        }
        want /= std::sqrt(static_cast<double>(block));
        // log2(block) sums and one product, each rounded: units of the largest partial sum.
        ASSERT_NEAR(y[row * stride + i], want, 10 * 0x1p-24 * size) << dims << " " << i;
      }
      for (size_t i = width; i < stride; ++i) ASSERT_EQ(y[row * stride + i], x[row * stride + i]);
    }
    rotate_heads(y.data(), static_cast<int64_t>(stride), 20, heads, dims, pool);
    for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], x[i], 20 * 0x1p-24 * 16 * 5);
  }
}

TEST(Rotate, DoesNotDependOnThreadsOrNeighbours) {
  ThreadPool one(1), four(4);
  const auto x = normal_values(50 * 128, 6);
  std::vector<float> together = x, alone = x;
  rotate_heads(together.data(), 128, 50, 2, 64, four);
  for (int64_t row = 0; row < 50; ++row) rotate_heads(alone.data() + row * 128, 128, 1, 2, 64, one);
  EXPECT_EQ(together, alone);
}

}  // namespace
}  // namespace fq::ops
