// Attention blocks of pre-norm layers. DecoderAttention is causal over paged KV of several
// sequences; EncoderAttention is full attention inside blocks of rows (frames of a vision tower).
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "src/blocks/layers.h"
#include "src/quant/kv_format.h"

namespace fq::blocks {

// Consecutive rows of one sequence inside a batch of rows, and the KV of the layer they attend to.
struct KvSegment {
  int64_t row = 0;  // first row in the batch
  int64_t rows = 0;
  int64_t begin = 0;                  // tokens in the layer's KV before these rows
  std::byte* const* pages = nullptr;  // already long enough for begin + rows tokens
};

class DecoderAttention {
 public:
  static Result<DecoderAttention> bind(const Binder& binder, const std::string& layer,
                                       const model::DecoderSpec& spec,
                                       const quant::KvPageLayout& layout, const float* inv_freq);

  // The linears that forward() begins with, and those that are computed after it. Both blocks stay
  // where they are.
  LinearCall first_call() const { return {{&*q_, &*k_, &*v_}}; }
  void lead_to(const LinearCall& next);

  int64_t scratch_floats(int64_t rows) const;
  // x[rows, hidden] += o(attention(...)). Appends K and V of every row to its segment's pages
  // first. `items` is scratch for one AttentionArgs per segment, reused between calls.
  void forward(float* x, int64_t rows, const int32_t* positions,
               std::span<const KvSegment> segments, float* scratch,
               std::vector<ops::AttentionArgs>* items, ThreadPool& pool) const;

  // forward() in two steps, for a layer of which only some rows are read afterwards: append() of
  // all rows, then attend() of those, whose segments begin behind the rows that have been left out.
  // The same bits as forward() for the rows that are there.
  void append(const float* x, int64_t rows, const int32_t* positions,
              std::span<const KvSegment> segments, float* scratch, ThreadPool& pool) const;
  void attend(float* x, int64_t rows, const int32_t* positions, std::span<const KvSegment> segments,
              float* scratch, std::vector<ops::AttentionArgs>* items, ThreadPool& pool) const;

  // Queries (after rope) of x[rows, hidden] into q[rows, heads*head_dim], for importance().
  // scratch: rows * hidden.
  void queries(const float* x, int64_t rows, const int32_t* positions, float* q, float* scratch,
               ThreadPool& pool) const;
  // Mean attention that the tokens of the KV received from `count` query rows (the last ones).
  // out[length].
  void importance(const float* q, int count, std::byte* const* pages, int64_t length, float* out,
                  ThreadPool& pool) const;

 private:
  int64_t q_width() const { return int64_t{spec_.heads} * spec_.head_dim; }
  int64_t kv_width() const { return int64_t{spec_.kv_heads} * spec_.head_dim; }
  ops::KvView view(const KvSegment& segment) const {
    return {.layout = layout_, .pages = segment.pages, .length = segment.begin + segment.rows};
  }
  // What follows the projections: queries or keys take their positions, ...
  void place(float* rows_of_heads, int64_t rows, int heads, const int32_t* positions,
             ThreadPool& pool) const;
  // ... keys and values go to the pages, ...
  void store(float* k, float* v, int64_t rows, const int32_t* positions,
             std::span<const KvSegment> segments, ThreadPool& pool) const;
  // ... and x += o(attention of q); `out` is scratch like q.
  void mix(const float* q, float* out, float* x, int64_t rows, std::span<const KvSegment> segments,
           std::vector<ops::AttentionArgs>* items, ThreadPool& pool) const;

  model::AttentionSpec spec_;
  int hidden_ = 0;
  const quant::KvPageLayout* layout_ = nullptr;
  ops::RopeTable rope_table_;
  std::optional<Norm> norm_;
  std::optional<Linear> q_, k_, v_, o_;
  backend::RopeFn rope_ = nullptr;
  backend::KvAppendFn append_ = nullptr;
  backend::AttentionFn attention_ = nullptr;
  backend::ImportanceFn importance_ = nullptr;
  bool exact_ = false;
};

class EncoderAttention {
 public:
  static Result<EncoderAttention> bind(const Binder& binder, const std::string& layer,
                                       const model::VisionSpec& spec);

  int64_t scratch_floats(int64_t rows) const;
  // x[blocks * tokens, hidden] in place.
  void forward(float* x, int64_t blocks, int64_t tokens, float* scratch, ThreadPool& pool) const;

 private:
  model::AttentionSpec spec_;
  int hidden_ = 0;
  std::optional<Norm> norm_;
  std::optional<Linear> q_, k_, v_, o_;
  backend::EncoderAttentionFn attention_ = nullptr;
};

}  // namespace fq::blocks
