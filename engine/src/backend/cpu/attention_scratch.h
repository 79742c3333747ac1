// Panels and states of one thread of an attention kernel. The scratch of all threads of a pool
// belongs to the thread that calls the kernel, which sizes it before the others start: a decode
// step allocates nothing, whichever thread takes an item first.
#pragma once

#include <cstdint>
#include <vector>

#include "src/core/aligned.h"

namespace fq::backend::cpu {

struct AttentionScratch {
  AlignedBuffer<float> q, scores, k, v, state, chunk_state;
  AlignedBuffer<float> factors;  // of the rows: what scores are times
  // KV with codes: words of the page, its scales and zeros; codes of the queries and their sums by
  // group, codes of the weights with one number of each kind per row.
  AlignedBuffer<uint32_t> words;
  AlignedBuffer<float> scales, steps;
  AlignedBuffer<int32_t> zeros, q_sums, zero_sums;
  AlignedBuffer<int16_t> q_codes, weight_codes;
};

inline std::vector<AttentionScratch>& attention_scratch(int threads) {
  static thread_local std::vector<AttentionScratch> scratch;
  if (scratch.size() < static_cast<size_t>(threads)) scratch.resize(static_cast<size_t>(threads));
  return scratch;
}

}  // namespace fq::backend::cpu
