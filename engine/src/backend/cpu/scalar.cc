// The scalar references as a backend: rows are dealt to the threads, arithmetic is untouched. Owns
// nothing; called by the engine thread.
#include <algorithm>

#include "src/backend/cpu/kernels.h"

namespace fq::backend::cpu {
namespace {

// Calls body(begin, end) for one consecutive share of [0, rows) per thread.
template <class Body>
void share_rows(int64_t rows, ThreadPool& pool, const Body& body) {
  const int64_t shares = std::min<int64_t>(rows, pool.threads());
  pool.parallel_for(shares, [&](int64_t share, int) {
    body(rows * share / shares, rows * (share + 1) / shares);
  });
}

void linear(const ops::LinearArgs& args, ThreadPool& pool) {
  share_rows(args.rows, pool, [&](int64_t begin, int64_t end) {
    for (const ops::LinearArgs* one = &args; one != nullptr; one = one->next) {
      ops::LinearArgs part = *one;
      part.x += begin * part.x_stride;
      part.y += begin * part.y_stride;
      part.rows = end - begin;
      part.next = nullptr;
      ops::linear_reference(part);
    }
  });
}

template <void (*kReference)(const ops::NormArgs&)>
void norm(const ops::NormArgs& args, ThreadPool& pool) {
  share_rows(args.rows, pool, [&](int64_t begin, int64_t end) {
    ops::NormArgs part = args;
    part.x += begin * args.width;
    part.y += begin * args.width;
    part.rows = end - begin;
    kReference(part);
  });
}

void rope(const ops::RopeArgs& args, ThreadPool& pool) {
  share_rows(args.rows, pool, [&](int64_t begin, int64_t end) {
    ops::RopeArgs part = args;
    part.x += begin * args.stride;
    part.positions += begin;
    part.rows = end - begin;
    ops::rope_reference(part);
  });
}

void kv_append(const ops::KvAppendArgs& args, ThreadPool& pool) {
  // Tokens of a page may share bytes, eight at most: cut between eights of the page.
  constexpr int64_t kTogether = 8;
  if (args.rows == 0) return;
  const int64_t first = args.begin / kTogether;
  share_rows((args.begin + args.rows - 1) / kTogether + 1 - first, pool,
             [&](int64_t begin, int64_t end) {
               const int64_t from = std::max(args.begin, (first + begin) * kTogether);
               const int64_t to = std::min(args.begin + args.rows, (first + end) * kTogether);
               ops::KvAppendArgs part = args;
               part.k += (from - args.begin) * args.k_stride;
               part.v += (from - args.begin) * args.v_stride;
               part.begin = from;
               part.rows = to - from;
               ops::kv_append_reference(part);
             });
}

void attention(std::span<const ops::AttentionArgs> items, ThreadPool& pool) {
  for (const ops::AttentionArgs& args : items) {
    share_rows(args.rows, pool, [&](int64_t begin, int64_t end) {
      ops::AttentionArgs part = args;
      part.q += begin * args.q_stride;
      part.out += begin * args.out_stride;
      part.begin += begin;
      part.rows = end - begin;
      ops::attention_reference(part);
    });
  }
}

void importance(const ops::ImportanceArgs& args, ThreadPool&) { ops::importance_reference(args); }

template <void (*kReference)(const ops::EncoderAttentionArgs&)>
void encoder_attention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  share_rows(args.blocks, pool, [&](int64_t begin, int64_t end) {
    ops::EncoderAttentionArgs part = args;
    const int64_t skip = begin * args.tokens * args.stride;
    part.q += skip;
    part.k += skip;
    part.v += skip;
    part.out += skip;
    part.blocks = end - begin;
    kReference(part);
  });
}

void activation(const ops::ActivationArgs& args, ThreadPool& pool) {
  share_rows(args.count, pool, [&](int64_t begin, int64_t end) {
    ops::ActivationArgs part = args;
    part.x += begin;
    part.y += begin;
    if (part.gate != nullptr) part.gate += begin;
    part.count = end - begin;
    ops::activation_reference(part);
  });
}

void similarity(const ops::SimilarityArgs& args, ThreadPool&) { ops::similarity_reference(args); }

}  // namespace

Kernels scalar_kernels() {
  Kernels k;
  k.linear_f32 = k.linear_bf16 = linear;
  k.linear_affine.fill(linear);
  k.linear_integer.fill(linear);
  k.rms_norm = norm<ops::rms_norm_reference>;
  k.layer_norm = norm<ops::layer_norm_reference>;
  k.rope = rope;
  k.kv_append = kv_append;
  k.attention = attention;
  k.importance = importance;
  k.encoder_attention = encoder_attention<ops::encoder_attention_reference>;
  k.integer_encoder_attention = encoder_attention<ops::integer_encoder_attention_reference>;
  k.activation.fill(activation);
  k.similarity = similarity;
  return k;
}

}  // namespace fq::backend::cpu
