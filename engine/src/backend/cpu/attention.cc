// Attention kernels. All of them are the online softmax of ops/attention.cc over blocks of 64
// tokens, run on a tile of query rows at once: scores and outputs are two inner products
// (gemm-inl.h) around a softmax of the tile's rows, so a page is dequantized once per tile and the
// heads that share it. Decode is a tile of one row. Every row keeps its own order of operations,
// hence the same result in any tile. Scratch is per thread. Called by the engine thread, runs on
// the pool.
#include <algorithm>
#include <cstring>
#include <limits>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/core/aligned.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/math-inl.h"
#include "src/backend/cpu/pages-inl.h"

#ifndef FRAMEQUILT_CPU_ATTENTION_ONCE
#define FRAMEQUILT_CPU_ATTENTION_ONCE
namespace fq::backend::cpu {

inline constexpr int64_t kTileRows = 96;  // query rows (times heads of a group) of one tile
inline constexpr int64_t kBlock = quant::kPageTokens;

// Running state of a tile, and its panels.
struct AttentionScratch {
  AlignedBuffer<float> q, scores, out, lanes, most, k, v;

  void reserve(int64_t rows, int64_t head_dim, int64_t out_stride) {
    q.reserve(static_cast<size_t>(rows * head_dim));
    scores.reserve(static_cast<size_t>(rows * kBlock));
    out.reserve(static_cast<size_t>(rows * out_stride));
    lanes.reserve(static_cast<size_t>(rows * ops::kSumLanes));
    most.reserve(static_cast<size_t>(rows));
  }
};

inline AttentionScratch& attention_scratch() {
  static thread_local AttentionScratch scratch;
  return scratch;
}

}  // namespace fq::backend::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// --- Softmax of one row ----------------------------------------------------------------------

// scores[0, n) times scale, in place; the largest of them and `most`. Lanes past n become -infinity
// up to a whole vector.
HWY_INLINE float ScaleAndMax(float* scores, int64_t n, float scale, float most) {
  const DF df;
  const VF factor = hn::Set(df, scale);
  const VF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
  VF highest = hn::Set(df, most);
  for (int64_t t = 0; t < n; t += kLanes) {
    VF s = hn::Mul(hn::Load(df, scores + t), factor);
    if (t + kLanes > n) s = hn::IfThenElse(hn::FirstN(df, static_cast<size_t>(n - t)), s, lowest);
    hn::Store(s, df, scores + t);
    highest = hn::Max(highest, s);
  }
  return hn::GetLane(hn::MaxOfLanes(df, highest));
}

// scores[0, n) become exp(score - most) and are added to the 16 sums; -infinity becomes 0. n is a
// multiple of kLanes.
HWY_INLINE void ExpAndSum(float* scores, int64_t n, float most, LaneSums& sums) {
  const DF df;
  const VF shift = hn::Set(df, most);
  for (int64_t t = 0; t < n; t += kSumLanes) {
    Unrolled<LaneSums::kParts>([&](auto part) FRAMEQUILT_INLINE {
      const int64_t at = t + part * kLanes;
      if (at < n) {
        const VF p = Exp(hn::Sub(hn::Load(df, scores + at), shift));
        hn::Store(p, df, scores + at);
        sums.parts[part] = hn::Add(sums.parts[part], p);
      }
    });
  }
}

// One block for one row of the tile: n visible tokens of `tokens`; probabilities of the others are
// 0.
HWY_INLINE void SoftmaxRow(float* scores, int64_t n, int64_t tokens, float scale, float* most,
                           float* lanes, float* out, int64_t out_stride) {
  const DF df;
  const float old_most = *most;
  *most = ScaleAndMax(scores, n, scale, old_most);
  const VF rescale = Exp(hn::Set(df, old_most - *most));
  LaneSums sums;
  Unrolled<LaneSums::kParts>([&](auto i) FRAMEQUILT_INLINE {
    sums.parts[i] = hn::Mul(hn::Load(df, lanes + i * kLanes), rescale);
  });
  const int64_t whole = RoundUp(n, kLanes);
  ExpAndSum(scores, whole, *most, sums);
  sums.Store(lanes);
  for (int64_t t = whole; t < tokens; t += kLanes) hn::Store(hn::Zero(df), df, scores + t);
  if (old_most == *most) return;  // rescale is exactly 1
  for (int64_t d = 0; d < out_stride; d += kLanes)
    hn::Store(hn::Mul(hn::Load(df, out + d), rescale), df, out + d);
}

// --- A tile ----------------------------------------------------------------------------------

struct Tile {
  AttentionScratch& s;
  int64_t rows;
  int64_t head_dim;
  int64_t out_stride;  // head_dim rounded up to kLanes
  float scale;

  Tile(AttentionScratch& scratch, int64_t row_count, int64_t dims, float factor)
      : s(scratch),
        rows(row_count),
        head_dim(dims),
        out_stride(RoundUp(dims, kLanes)),
        scale(factor) {
    s.reserve(rows, head_dim, out_stride);
    std::fill_n(s.out.data(), rows * out_stride, 0.0f);
    std::fill_n(s.lanes.data(), rows * kSumLanes, 0.0f);
    std::fill_n(s.most.data(), rows, -std::numeric_limits<float>::infinity());
  }

  void SetQuery(int64_t row, const float* q) {
    std::memcpy(s.q.data() + row * head_dim, q, static_cast<size_t>(head_dim) * sizeof(float));
  }

  // Rows [first, rows) attend to a block of `tokens` tokens, row r to the first visible(r) of them.
  template <class Visible>
  HWY_INLINE void AddBlock(const Panel& k, const Panel& v, int64_t first, int64_t tokens,
                           const Visible& visible) {
    const int64_t whole = RoundUp(tokens, kLanes);
    GemmBlock g;
    g.a = s.q.data() + first * head_dim;
    g.a_stride = head_dim;
    g.b = k.data;
    g.b_stride = k.stride;
    g.c = s.scores.data() + first * kBlock;
    g.c_stride = kBlock;
    g.k = head_dim;
    g.first = true;
    Gemm(g, rows - first, whole);
    for (int64_t r = first; r < rows; ++r) {
      SoftmaxRow(s.scores.data() + r * kBlock, visible(r), whole, scale, s.most.data() + r,
                 s.lanes.data() + r * kSumLanes, s.out.data() + r * out_stride, out_stride);
    }
    g.a = s.scores.data() + first * kBlock;
    g.a_stride = kBlock;
    g.b = v.data;
    g.b_stride = v.stride;
    g.c = s.out.data() + first * out_stride;
    g.c_stride = out_stride;
    g.k = tokens;
    g.first = false;
    Gemm(g, rows - first, out_stride);
  }

  void Finish(int64_t row, float* out) {
    const float inverse = 1.0f / ops::add_lanes(s.lanes.data() + row * kSumLanes);
    const float* const sums = s.out.data() + row * out_stride;
    for (int64_t d = 0; d < head_dim; ++d) out[d] = sums[d] * inverse + 0.0f;
  }
};

// --- Causal attention over pages -------------------------------------------------------------

// Consecutive rows [row_begin, row_end) of one sequence, and query heads [head_begin, head_end)
// that share a kv head.
struct AttentionItem {
  int64_t row_begin = 0, row_end = 0;
  int64_t head_begin = 0, head_end = 0;
};

void RunItem(const ops::AttentionArgs& args, const AttentionItem& item) {
  const KvPageLayout& layout = *args.kv.layout;
  const int64_t dims = layout.head_dim;
  const int64_t heads = item.head_end - item.head_begin;
  const int64_t kv_head = item.head_begin / (args.heads / layout.kv_heads);
  AttentionScratch& scratch = attention_scratch();
  Tile tile(scratch, (item.row_end - item.row_begin) * heads, dims, args.scale);
  scratch.k.reserve(static_cast<size_t>(dims * kBlock));
  scratch.v.reserve(static_cast<size_t>(kBlock * tile.out_stride + kPanelSlack));
  const auto place = [&](int64_t r, int64_t stride) {
    return (item.row_begin + r / heads) * stride + (item.head_begin + r % heads) * dims;
  };
  for (int64_t r = 0; r < tile.rows; ++r) tile.SetQuery(r, args.q + place(r, args.q_stride));
  const int64_t first_visible = args.begin + item.row_begin + 1;  // of the first row
  const int64_t last_visible = args.begin + item.row_end;
  for (int64_t begin = 0; begin < last_visible; begin += kBlock) {
    const std::byte* const head =
        args.kv.pages[begin / kBlock] + layout.head_bytes * static_cast<size_t>(kv_head);
    const int64_t tokens = std::min(kBlock, last_visible - begin);
    const Panel k = ReadK(layout, head, RoundUp(tokens, kLanes), scratch.k.data());
    const Panel v = ReadV(layout, head, tokens, tile.out_stride, scratch.v.data());
    // Rows before `first` see none of it.
    const int64_t first = std::max<int64_t>(0, begin + 1 - first_visible) * heads;
    tile.AddBlock(k, v, first, tokens, [&](int64_t r) FRAMEQUILT_INLINE {
      return std::min(tokens, first_visible + r / heads - begin);
    });
  }
  for (int64_t r = 0; r < tile.rows; ++r) tile.Finish(r, args.out + place(r, args.out_stride));
}

// How one sequence is cut into items.
struct AttentionCut {
  int64_t tile_rows, tiles;  // query rows
  int64_t per_kv, parts;     // heads of a kv head, and the parts these are cut into
  int64_t items;

  AttentionCut(const ops::AttentionArgs& args, int64_t want_parts) {
    const int64_t kv_heads = args.kv.layout->kv_heads;
    per_kv = args.heads / kv_heads;
    parts = std::min(per_kv, want_parts);
    tile_rows = std::max<int64_t>(1, kTileRows / per_kv);
    tiles = (args.rows + tile_rows - 1) / tile_rows;
    items = tiles * kv_heads * parts;
  }

  AttentionItem item(const ops::AttentionArgs& args, int64_t index) const {
    const int64_t part = index % parts, kv_head = index / parts % args.kv.layout->kv_heads;
    // Last rows first: they see most, and the end of the loop should be made of small items.
    const int64_t tile = tiles - 1 - index / (parts * args.kv.layout->kv_heads);
    return {.row_begin = tile * tile_rows,
            .row_end = std::min(args.rows, (tile + 1) * tile_rows),
            .head_begin = kv_head * per_kv + per_kv * part / parts,
            .head_end = kv_head * per_kv + per_kv * (part + 1) / parts};
  }
};

void Attention(std::span<const ops::AttentionArgs> list, ThreadPool& pool) {
  int64_t items = 0;
  for (const ops::AttentionArgs& args : list) items += AttentionCut(args, 1).items;
  if (items == 0) return;
  // With fewer items than threads the heads of a group are dealt out too: pages are then read more
  // than once, but nobody is idle.
  const int64_t parts = (pool.threads() + items - 1) / items;
  items = 0;
  for (const ops::AttentionArgs& args : list) items += AttentionCut(args, parts).items;
  pool.parallel_for(items, [&](int64_t item, int) {
    for (const ops::AttentionArgs& args : list) {
      const AttentionCut cut(args, parts);
      if (item < cut.items) return RunItem(args, cut.item(args, item));
      item -= cut.items;
    }
  });
}

// --- Importance ------------------------------------------------------------------------------

// Mean-free sum over the heads of one kv head and the queries: part [length].
void ImportanceHead(const ops::ImportanceArgs& args, int kv_head, float* part) {
  const DF df;
  const KvPageLayout& layout = *args.kv.layout;
  const int64_t dims = layout.head_dim, length = args.kv.length, queries = args.queries;
  const int64_t heads = args.heads / layout.kv_heads;
  const int64_t rows = heads * queries, stride = RoundUp(length, kBlock);
  AttentionScratch& s = attention_scratch();
  s.q.reserve(static_cast<size_t>(rows * dims));
  s.scores.reserve(static_cast<size_t>(rows * stride));
  s.k.reserve(static_cast<size_t>(dims * kBlock));
  for (int64_t r = 0; r < rows; ++r) {  // queries inside heads
    const float* const q =
        args.q + r % queries * args.q_stride + (kv_head * heads + r / queries) * dims;
    std::memcpy(s.q.data() + r * dims, q, static_cast<size_t>(dims) * sizeof(float));
  }
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const std::byte* const head =
        args.kv.pages[begin / kBlock] + layout.head_bytes * static_cast<size_t>(kv_head);
    const int64_t tokens = RoundUp(std::min(kBlock, length - begin), kLanes);
    const Panel k = ReadK(layout, head, tokens, s.k.data());
    GemmBlock g;
    g.a = s.q.data();
    g.a_stride = dims;
    g.b = k.data;
    g.b_stride = k.stride;
    g.c = s.scores.data() + begin;
    g.c_stride = stride;
    g.k = dims;
    g.first = true;
    Gemm(g, rows, tokens);
  }
  std::fill_n(part, length, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    float* const scores = s.scores.data() + r * stride;
    const int64_t visible = length - queries + r % queries + 1;
    const float most =
        ScaleAndMax(scores, visible, args.scale, -std::numeric_limits<float>::infinity());
    LaneSums sums;
    ExpAndSum(scores, RoundUp(visible, kLanes), most, sums);
    HWY_ALIGN float lanes[kSumLanes];
    sums.Store(lanes);
    const float inverse = 1.0f / ops::add_lanes(lanes);
    int64_t t = 0;
    for (; t + kLanes <= visible; t += kLanes) {
      const VF p = hn::Mul(hn::Load(df, scores + t), hn::Set(df, inverse));
      hn::StoreU(hn::Add(hn::LoadU(df, part + t), p), df, part + t);
    }
    for (; t < visible; ++t) part[t] += scores[t] * inverse;
  }
}

void Importance(const ops::ImportanceArgs& args, ThreadPool& pool) {
  static thread_local AlignedBuffer<float> parts;  // of the caller: [kv_heads, length]
  const int64_t kv_heads = args.kv.layout->kv_heads, length = args.kv.length;
  parts.reserve(static_cast<size_t>(kv_heads * length));
  float* const sums = parts.data();
  pool.parallel_for(kv_heads, [&](int64_t head, int) {
    ImportanceHead(args, static_cast<int>(head), sums + head * length);
  });
  const float mean = 1.0f / static_cast<float>(args.heads * args.queries);
  for (int64_t t = 0; t < length; ++t) {
    float sum = 0.0f;
    for (int64_t head = 0; head < kv_heads; ++head) sum += sums[head * length + t];
    args.out[t] = sum * mean;
  }
}

// --- Encoder attention -----------------------------------------------------------------------

// One head of one block of rows: K transposed and V packed once, then tiles of queries.
void EncoderItem(const ops::EncoderAttentionArgs& args, int64_t block, int64_t head) {
  const int64_t dims = args.head_dim, tokens = args.tokens;
  const int64_t base = block * tokens * args.stride + head * dims;
  const int64_t k_stride = RoundUp(tokens, kBlock), v_stride = RoundUp(dims, kLanes);
  AttentionScratch& s = attention_scratch();
  s.k.reserve(static_cast<size_t>(dims * k_stride));
  s.v.reserve(static_cast<size_t>(tokens * v_stride));
  // Columns behind the last token are computed with but never used: they need a value.
  for (int64_t d = 0; d < dims; ++d)
    std::fill_n(s.k.data() + d * k_stride + tokens, k_stride - tokens, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* const k = args.k + base + t * args.stride;
    for (int64_t d = 0; d < dims; ++d) s.k[static_cast<size_t>(d * k_stride + t)] = k[d];
    float* const v = s.v.data() + t * v_stride;
    std::memcpy(v, args.v + base + t * args.stride, static_cast<size_t>(dims) * sizeof(float));
    std::fill_n(v + dims, v_stride - dims, 0.0f);
  }
  for (int64_t row = 0; row < tokens; row += kTileRows) {
    Tile tile(s, std::min(kTileRows, tokens - row), dims, args.scale);
    for (int64_t r = 0; r < tile.rows; ++r)
      tile.SetQuery(r, args.q + base + (row + r) * args.stride);
    for (int64_t begin = 0; begin < tokens; begin += kBlock) {
      const int64_t count = std::min(kBlock, tokens - begin);
      tile.AddBlock({s.k.data() + begin, k_stride}, {s.v.data() + begin * v_stride, v_stride}, 0,
                    count, [&](int64_t) FRAMEQUILT_INLINE { return count; });
    }
    for (int64_t r = 0; r < tile.rows; ++r)
      tile.Finish(r, args.out + base + (row + r) * args.stride);
  }
}

void EncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  pool.parallel_for(args.blocks * args.heads, [&](int64_t item, int) {
    EncoderItem(args, item / args.heads, item % args.heads);
  });
}

#else  // one-lane targets: never chosen, see simd_targets()

void Attention(std::span<const ops::AttentionArgs> list, ThreadPool& pool) {
  scalar_kernels().attention(list, pool);
}
void Importance(const ops::ImportanceArgs& args, ThreadPool& pool) {
  scalar_kernels().importance(args, pool);
}
void EncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  scalar_kernels().encoder_attention(args, pool);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(Attention);
HWY_EXPORT(Importance);
HWY_EXPORT(EncoderAttention);

void fill_attention_kernels(Kernels& kernels) {
  kernels.attention = &HWY_DYNAMIC_DISPATCH(Attention);
  kernels.importance = &HWY_DYNAMIC_DISPATCH(Importance);
  kernels.encoder_attention = &HWY_DYNAMIC_DISPATCH(EncoderAttention);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
