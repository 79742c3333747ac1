// Full attention inside blocks of rows (frames of a vision tower): the online softmax of
// ops/attention.cc over blocks of 64 tokens, on a tile of query rows at once. Called by the engine
// thread, runs on the pool.
#include <algorithm>
#include <cstring>

#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/encoder_attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

constexpr int64_t kTileRows = 96;

// One head of one block of rows: K transposed and V packed once, then tiles of queries. K lies as
// panels [head_dim][64] one behind the other: rows of a panel that were as far apart as the tokens
// are many would fall into few sets of the cache.
void EncoderItem(const ops::EncoderAttentionArgs& args, int64_t block, int64_t head,
                 AttentionScratch& s) {
  const int64_t dims = args.head_dim, tokens = args.tokens;
  const int64_t base = block * tokens * args.stride + head * dims;
  const int64_t v_stride = RoundUp(dims, kLanes);
  const auto k_panel = [&](int64_t token) { return s.k.data() + token / kBlock * dims * kBlock; };
  // Columns behind the last token are computed with but never used: they need a value.
  const int64_t behind = (kBlock - tokens % kBlock) % kBlock;
  for (int64_t d = 0; d < dims && behind > 0; ++d)
    std::fill_n(k_panel(tokens) + d * kBlock + tokens % kBlock, behind, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* const k = args.k + base + t * args.stride;
    float* const to = k_panel(t) + t % kBlock;
    for (int64_t d = 0; d < dims; ++d) to[d * kBlock] = k[d];
    float* const v = s.v.data() + t * v_stride;
    std::memcpy(v, args.v + base + t * args.stride, static_cast<size_t>(dims) * sizeof(float));
    std::fill_n(v + dims, v_stride - dims, 0.0f);
  }
  for (int64_t row = 0; row < tokens; row += kTileRows) {
    const int64_t rows = std::min(kTileRows, tokens - row);
    const SoftmaxState state(s.state.data(), kTileRows, v_stride);
    state.Reset(0, rows);
    const float* const q = args.q + base + row * args.stride;
    for (int64_t begin = 0; begin < tokens; begin += kBlock) {
      const int64_t count = std::min(kBlock, tokens - begin), whole = RoundUp(count, kLanes);
      PanelScores(q, args.stride, rows, dims, {k_panel(begin), kBlock}, whole, s.scores.data(),
                  kBlock);
      for (int64_t r = 0; r < rows; ++r)
        state.AddScores(r, s.scores.data() + r * kBlock, count, whole, args.scale);
      PanelValues(s.scores.data(), rows, count, {s.v.data() + begin * v_stride, v_stride}, v_stride,
                  state.out, v_stride);
    }
    for (int64_t r = 0; r < rows; ++r)
      state.Finish(r, dims, args.out + base + (row + r) * args.stride);
  }
}

void EncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  const int64_t v_stride = RoundUp(args.head_dim, kLanes);
  std::vector<AttentionScratch>& scratch = attention_scratch(pool.threads());
  for (AttentionScratch& s : scratch) {
    s.k.reserve(static_cast<size_t>(args.head_dim * RoundUp(args.tokens, kBlock)));
    s.v.reserve(static_cast<size_t>(args.tokens * v_stride));
    s.scores.reserve(static_cast<size_t>(kTileRows * kBlock));
    s.state.reserve(static_cast<size_t>(SoftmaxState::Floats(kTileRows, v_stride)));
  }
  pool.parallel_for(args.blocks * args.heads, [&](int64_t item, int thread) {
    EncoderItem(args, item / args.heads, item % args.heads, scratch[static_cast<size_t>(thread)]);
  });
}

#else  // one-lane targets: never chosen, see simd_targets()

void EncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  scalar_kernels().encoder_attention(args, pool);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(EncoderAttention);

void fill_encoder_attention_kernels(Kernels& kernels) {
  kernels.encoder_attention = &HWY_DYNAMIC_DISPATCH(EncoderAttention);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
