// Panels and states of one thread of an attention kernel. The scratch of all threads of a pool
// belongs to the thread that calls the kernel, which sizes it before the others start: a decode
// step allocates nothing, whichever thread takes an item first.
#pragma once

#include <cstdint>
#include <vector>

#include "src/core/aligned.h"

namespace fq::backend::cpu {

struct AttentionScratch {
  AlignedBuffer<float> q, scores, weights, k, v, params, state, chunk_state;
};

inline std::vector<AttentionScratch>& attention_scratch(int threads) {
  static thread_local std::vector<AttentionScratch> scratch;
  if (scratch.size() < static_cast<size_t>(threads)) scratch.resize(static_cast<size_t>(threads));
  return scratch;
}

}  // namespace fq::backend::cpu
