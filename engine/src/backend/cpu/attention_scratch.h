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
  // Their high and low bytes, where these are multiplied apart (amx_attention-inl.h).
  AlignedBuffer<uint8_t> q_high, q_low, weight_high, weight_low;
  int64_t q_rows = 0;  // rows that there is room for
};

// Of encoder attention: keys and values of a head, as floats or as codes, and a tile of queries on
// its way through it.
struct EncoderAttentionScratch {
  AlignedBuffer<float> scores, out;
  AlignedBuffer<float> k_rows, v_rows, q_panel;   // floats
  AlignedBuffer<float> rows, k_scales, v_scales;  // codes
  AlignedBuffer<int32_t> k_starts;
  AlignedBuffer<int32_t> v_starts;  // of folded words
  AlignedBuffer<uint32_t> k, v, q, pair;
  AlignedBuffer<int8_t> codes;  // of a row of queries or keys
  // With AMX: codes of the tile's queries, bytes of its probabilities.
  AlignedBuffer<int8_t> q_codes;
  AlignedBuffer<uint8_t> p_high, p_low;
};

template <class Scratch>
std::vector<Scratch>& scratch_of_threads(int threads) {
  static thread_local std::vector<Scratch> scratch;
  if (scratch.size() < static_cast<size_t>(threads)) scratch.resize(static_cast<size_t>(threads));
  return scratch;
}
inline std::vector<AttentionScratch>& attention_scratch(int threads) {
  return scratch_of_threads<AttentionScratch>(threads);
}
inline std::vector<EncoderAttentionScratch>& encoder_attention_scratch(int threads) {
  return scratch_of_threads<EncoderAttentionScratch>(threads);
}

}  // namespace fq::backend::cpu
