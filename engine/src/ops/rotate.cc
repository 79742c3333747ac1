// Hadamard rotation of heads by butterflies. Plain loops: sums and differences have one rounding
// each, so a compiler may use vectors of any width without changing a bit.
#include "src/ops/rotate.h"

#include <cmath>

namespace fq::ops {
namespace {

constexpr int64_t kRowsPerItem = 8;

void rotate_block(float* x, int size, float factor) {
  for (int distance = 1; distance < size; distance *= 2) {
    for (int begin = 0; begin < size; begin += 2 * distance) {
      float* const low = x + begin;
      float* const high = low + distance;
      for (int i = 0; i < distance; ++i) {
        const float a = low[i], b = high[i];
        low[i] = a + b;
        high[i] = a - b;
      }
    }
  }
  for (int i = 0; i < size; ++i) x[i] *= factor;
}

}  // namespace

void rotate_heads(float* x, int64_t stride, int64_t rows, int heads, int head_dim,
                  ThreadPool& pool) {
  const int block = rotation_block(head_dim);
  if (block == 1) return;
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  const int blocks = heads * (head_dim / block);
  pool.parallel_for((rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item, int) {
    const int64_t end = item * kRowsPerItem + kRowsPerItem;
    for (int64_t row = item * kRowsPerItem; row < end && row < rows; ++row) {
      for (int i = 0; i < blocks; ++i)
        rotate_block(x + row * stride + int64_t{i} * block, block, factor);
    }
  });
}

}  // namespace fq::ops
