#include "src/blocks/attention.h"

#include "src/ops/rotate.h"

namespace fq::blocks {

Result<DecoderAttention> DecoderAttention::bind(const Binder& binder, const std::string& layer,
                                                const model::DecoderSpec& spec,
                                                const quant::KvPageLayout& layout,
                                                const float* inv_freq) {
  DecoderAttention block;
  block.spec_ = spec.attention;
  block.hidden_ = spec.hidden;
  block.layout_ = &layout;
  block.exact_ = binder.exact;
  block.rope_table_ = {.inv_freq = inv_freq, .dims = spec.rope.dims};
  const bool bias = spec.attention.qkv_bias;
  FQ_ASSIGN_OR_RETURN(block.norm_,
                      Norm::bind(binder, layer + ".attention_norm", spec.norm, spec.hidden));
  FQ_ASSIGN_OR_RETURN(block.q_, Linear::bind(binder, layer + ".attention.q", bias));
  FQ_ASSIGN_OR_RETURN(block.k_, Linear::bind(binder, layer + ".attention.k", bias));
  FQ_ASSIGN_OR_RETURN(block.v_, Linear::bind(binder, layer + ".attention.v", bias));
  FQ_ASSIGN_OR_RETURN(block.o_,
                      Linear::bind(binder, layer + ".attention.o", spec.attention.output_bias));
  FQ_ASSIGN_OR_RETURN(block.rope_, binder.backend.rope());
  FQ_ASSIGN_OR_RETURN(block.append_, binder.backend.kv_append(layout));
  FQ_ASSIGN_OR_RETURN(block.attention_, binder.backend.attention(layout));
  FQ_ASSIGN_OR_RETURN(block.importance_, binder.backend.importance(layout));
  return block;
}

void DecoderAttention::lead_to(const LinearCall& next) {
  q_->lead_to({{&*o_}});
  o_->lead_to(next);
}

int64_t DecoderAttention::scratch_floats(int64_t rows) const {
  return rows * (hidden_ + 2 * q_width() + 2 * kv_width());
}

void DecoderAttention::place(float* rows_of_heads, int64_t rows, int heads,
                             const int32_t* positions, ThreadPool& pool) const {
  const int64_t width = int64_t{heads} * spec_.head_dim;
  rope_({.x = rows_of_heads,
         .stride = width,
         .rows = rows,
         .heads = heads,
         .head_dim = spec_.head_dim,
         .positions = positions,
         .table = rope_table_},
        pool);
  if (layout_->format.rotate)
    ops::rotate_heads(rows_of_heads, width, rows, heads, spec_.head_dim, pool);
}

void DecoderAttention::store(float* k, float* v, int64_t rows, const int32_t* positions,
                             std::span<const KvSegment> segments, ThreadPool& pool) const {
  place(k, rows, spec_.kv_heads, positions, pool);
  if (layout_->format.rotate)
    ops::rotate_heads(v, kv_width(), rows, spec_.kv_heads, spec_.head_dim, pool);
  for (const KvSegment& s : segments) {
    append_({.k = k + s.row * kv_width(),
             .v = v + s.row * kv_width(),
             .k_stride = kv_width(),
             .v_stride = kv_width(),
             .rows = s.rows,
             .begin = s.begin,
             .kv = view(s)},
            pool);
  }
}

void DecoderAttention::mix(const float* q, float* out, float* x, int64_t rows,
                           std::span<const KvSegment> segments,
                           std::vector<ops::AttentionArgs>* items, ThreadPool& pool) const {
  items->clear();
  for (const KvSegment& s : segments) {
    items->push_back({.q = q + s.row * q_width(),
                      .q_stride = q_width(),
                      .out = out + s.row * q_width(),
                      .out_stride = q_width(),
                      .rows = s.rows,
                      .begin = s.begin,
                      .heads = spec_.heads,
                      .scale = spec_.scale,
                      .kv = view(s),
                      .exact = exact_});
  }
  attention_(*items, pool);
  if (layout_->format.rotate)
    ops::rotate_heads(out, q_width(), rows, spec_.heads, spec_.head_dim, pool);
  o_->run(out, q_width(), rows, x, hidden_, true, pool);
}

void DecoderAttention::forward(float* x, int64_t rows, const int32_t* positions,
                               std::span<const KvSegment> segments, float* scratch,
                               std::vector<ops::AttentionArgs>* items, ThreadPool& pool) const {
  float* normed = scratch;
  float* q = normed + rows * hidden_;
  float* k = q + rows * q_width();
  float* v = k + rows * kv_width();
  float* out = v + rows * kv_width();
  norm_->run(x, normed, rows, pool);
  // Together they quantize their common input once.
  const Linear* const linears[] = {&*q_, &*k_, &*v_};
  ops::LinearArgs list[] = {q_->args(normed, hidden_, rows, q, q_width()),
                            k_->args(normed, hidden_, rows, k, kv_width()),
                            v_->args(normed, hidden_, rows, v, kv_width())};
  run_together(linears, list, pool);
  place(q, rows, spec_.heads, positions, pool);
  store(k, v, rows, positions, segments, pool);
  mix(q, out, x, rows, segments, items, pool);
}

void DecoderAttention::append(const float* x, int64_t rows, const int32_t* positions,
                              std::span<const KvSegment> segments, float* scratch,
                              ThreadPool& pool) const {
  float* normed = scratch;
  float* k = normed + rows * hidden_;
  float* v = k + rows * kv_width();
  norm_->run(x, normed, rows, pool);
  const Linear* const linears[] = {&*k_, &*v_};
  ops::LinearArgs list[] = {k_->args(normed, hidden_, rows, k, kv_width()),
                            v_->args(normed, hidden_, rows, v, kv_width())};
  run_together(linears, list, pool);
  store(k, v, rows, positions, segments, pool);
}

void DecoderAttention::attend(float* x, int64_t rows, const int32_t* positions,
                              std::span<const KvSegment> segments, float* scratch,
                              std::vector<ops::AttentionArgs>* items, ThreadPool& pool) const {
  float* q = scratch + rows * hidden_;
  queries(x, rows, positions, q, scratch, pool);
  mix(q, q + rows * q_width(), x, rows, segments, items, pool);
}

void DecoderAttention::queries(const float* x, int64_t rows, const int32_t* positions, float* q,
                               float* scratch, ThreadPool& pool) const {
  norm_->run(x, scratch, rows, pool);
  q_->run(scratch, hidden_, rows, q, q_width(), false, pool);
  place(q, rows, spec_.heads, positions, pool);
}

void DecoderAttention::importance(const float* q, int count, std::byte* const* pages,
                                  int64_t length, float* out, ThreadPool& pool) const {
  importance_({.q = q,
               .q_stride = q_width(),
               .queries = count,
               .heads = spec_.heads,
               .scale = spec_.scale,
               .kv = {.layout = layout_, .pages = pages, .length = length},
               .out = out,
               .exact = exact_},
              pool);
}

Result<EncoderAttention> EncoderAttention::bind(const Binder& binder, const std::string& layer,
                                                const model::VisionSpec& spec) {
  EncoderAttention block;
  block.spec_ = spec.attention;
  block.hidden_ = spec.hidden;
  const bool bias = spec.attention.qkv_bias;
  FQ_ASSIGN_OR_RETURN(block.norm_,
                      Norm::bind(binder, layer + ".attention_norm", spec.norm, spec.hidden));
  FQ_ASSIGN_OR_RETURN(block.q_, Linear::bind(binder, layer + ".attention.q", bias));
  FQ_ASSIGN_OR_RETURN(block.k_, Linear::bind(binder, layer + ".attention.k", bias));
  FQ_ASSIGN_OR_RETURN(block.v_, Linear::bind(binder, layer + ".attention.v", bias));
  FQ_ASSIGN_OR_RETURN(block.o_,
                      Linear::bind(binder, layer + ".attention.o", spec.attention.output_bias));
  const model::ActivationFormat& activations =
      binder.activations ? binder.activations->attention : spec.attention_activations;
  FQ_ASSIGN_OR_RETURN(block.attention_,
                      binder.backend.encoder_attention(spec.attention.head_dim, activations));
  const int64_t patches = int64_t{spec.grid()} * spec.grid();
  if (activations.quantized() && patches > ops::kIntegerAttentionMostTokens) {
    return Error{
        Code::kUnsupported,
        std::to_string(patches) + " patches are too many for attention with " + activations.name() +
            " queries and keys",
        "at most " + std::to_string(ops::kIntegerAttentionMostTokens) + "; leave attention=a8 out"};
  }
  return block;
}

int64_t EncoderAttention::scratch_floats(int64_t rows) const {
  return rows * (hidden_ + 4 * int64_t{spec_.heads} * spec_.head_dim);
}

void EncoderAttention::forward(float* x, int64_t blocks, int64_t tokens, float* scratch,
                               ThreadPool& pool) const {
  const int64_t rows = blocks * tokens;
  const int64_t width = int64_t{spec_.heads} * spec_.head_dim;
  float* normed = scratch;
  float* q = normed + rows * hidden_;
  float* k = q + rows * width;
  float* v = k + rows * width;
  float* out = v + rows * width;
  norm_->run(x, normed, rows, pool);
  const Linear* const linears[] = {&*q_, &*k_, &*v_};
  ops::LinearArgs list[] = {q_->args(normed, hidden_, rows, q, width),
                            k_->args(normed, hidden_, rows, k, width),
                            v_->args(normed, hidden_, rows, v, width)};
  run_together(linears, list, pool);
  attention_({.q = q,
              .k = k,
              .v = v,
              .out = out,
              .stride = width,
              .blocks = blocks,
              .tokens = tokens,
              .heads = spec_.heads,
              .head_dim = spec_.head_dim,
              .scale = spec_.scale},
             pool);
  o_->run(out, width, rows, x, hidden_, true, pool);
}

}  // namespace fq::blocks
