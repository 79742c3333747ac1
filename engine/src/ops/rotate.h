// The orthogonal rotation that a KV format may ask for: every head's vector times the normalised
// Hadamard matrix of its size. The matrix is its own inverse, so q and k rotated have the same
// product, and the attention output over rotated v is rotated back by the same call. It spreads an
// outlier dim over all of them, which makes the range of a group smaller. Owns nothing.
#pragma once

#include <cstdint>

#include "src/core/thread_pool.h"

namespace fq::ops {

// Size of the matrix: the largest power of two that divides head_dim; a head is rotated in blocks
// of it. 1 (odd head_dim): nothing happens.
constexpr int rotation_block(int head_dim) { return head_dim & -head_dim; }

// In place, x[rows, heads * head_dim]; a row starts every `stride` floats. The butterflies of a
// block in ascending distance, then times 1 / sqrt(block): the same operations on any thread.
void rotate_heads(float* x, int64_t stride, int64_t rows, int heads, int head_dim,
                  ThreadPool& pool);

}  // namespace fq::ops
