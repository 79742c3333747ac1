// Causal attention over pages, and the importance of tokens. A tile of query rows (all heads of a
// kv head) goes over the pages of its sequence. Codes of a page become words once per tile, for
// integer products (code_products-inl.h), or, for few rows, words in registers
// (direct_products-inl.h); floats are multiplied straight from the page by few rows
// (half_products-inl.h), from a panel of float32 by many, and so are codes where `exact` is asked
// for (exact_products-inl.h). The pages are cut into chunks of kAttentionChunk tokens, computed
// alone and merged in order: one after the other, or, where there are fewer tiles than threads, on
// several threads. Every row keeps its own order of operations (ops/attention.cc), hence the same
// result in any tile, on any number of threads. Called by the engine thread, runs on the pool.
#include <algorithm>
#include <cstring>

#define FRAMEQUILT_WANT_VNNI 1
#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/amx_attention-inl.h"
#include "src/backend/cpu/attention_tile-inl.h"
#include "src/backend/cpu/code_products-inl.h"
#include "src/backend/cpu/direct_products-inl.h"
#include "src/backend/cpu/exact_products-inl.h"
#include "src/backend/cpu/half_products-inl.h"
#include "src/backend/cpu/integer-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

constexpr int64_t kProductMostRows = 16;  // up to here straight from the page
constexpr int64_t kSplitRows = 32;        // up to here chunks go to different threads
constexpr int64_t kRoundItems = 16;       // chunks of a round, per thread
constexpr size_t kFarBytes = 12 << 10;    // of a page: two halves on their way leave room to work

// Row `row` of the scratch: as it is, or as codes.
void LoadQuery(const KvPageLayout& layout, bool exact, const float* q, int64_t row, float scale,
               AttentionScratch& s) {
  const int64_t dims = layout.head_dim;
  float& factor = s.factors[static_cast<size_t>(row)];
  factor = scale;
  if (layout.k.has_codes() && !exact) {
    factor *= QueryCodes(q, layout.k, dims, s.q_codes.data() + row * 2 * QueryWords(layout.k),
                         s.q_sums.data() + row * layout.k.groups);
#if FRAMEQUILT_HAVE_AMX
    SplitQuery(layout.k, row, s);
#endif
  } else {
    std::memcpy(s.q.data() + row * dims, q, static_cast<size_t>(dims) * sizeof(float));
  }
}

// --- One page ----------------------------------------------------------------------------------

// What the next product reads. Scales and zeros come first, at once: they lie behind the codes, but
// are read before them.
Ahead AheadOf(const KvPart& part, const std::byte* head, size_t end) {
  if (!part.has_codes()) return {head + part.low, head + end};
  Ahead params{head + part.scales, head + end};
  params.AskAll();
  return {head + part.low, head + part.scales};
}
// K of a head of a page lies before its V.
Ahead AheadOfK(const KvPageLayout& layout, const std::byte* head) {
  return AheadOf(layout.k, head, layout.v.low);
}
Ahead AheadOfV(const KvPageLayout& layout, const std::byte* head) {
  return AheadOf(layout.v, head, layout.head_bytes);
}

// Scores, before their factors, of rows [first, first + rows) of the scratch with `tokens` tokens
// of a page: scores [rows][stride].
void PageScores(const KvPageLayout& layout, bool exact, const std::byte* head, int64_t first,
                int64_t rows, int64_t tokens, AttentionScratch& s, float* scores, int64_t stride,
                Ahead ahead) {
  const KvPart& part = layout.k;
  const int64_t whole = RoundUp(tokens, kLanes);
  if (part.has_codes() && exact)
    return ExactScores(layout, head, first, rows, tokens, s, scores, stride);
#if FRAMEQUILT_HAVE_AMX
  if (part.has_codes() && rows >= kAmxLeastRows)
    return AmxScores(layout, head, first, rows, s, scores, stride, ahead);
#endif
  if (part.has_codes()) {
    const PageParams params = ReadParams(layout, part, head, s.scales.data(), s.zeros.data());
    CodeScores x;
    x.products.a_row = QueryWords(part);
    x.products.a_step = 1;
    x.products.b_step = kPageTokens;
    x.products.steps = (part.group + 1) / 2;
    x.sums_row = part.groups;
    x.c = scores;
    x.c_stride = stride;
    x.ahead = ahead;
    const auto* const words = reinterpret_cast<const uint32_t*>(s.q_codes.data());
    const auto multiply = [&](const auto& products) {
      for (int64_t g = 0; g < part.groups; ++g) {
        x.products.a = words + first * x.products.a_row + g * x.products.steps;
        x.sums = s.q_sums.data() + first * x.sums_row + g;
        x.scales = params.scales + g * kPageTokens;
        x.zeros = params.zeros + g * kPageTokens;
        x.first = g == 0;
        products(g);
      }
    };
#if FRAMEQUILT_HAVE_DIRECT
    if (part.group % kDirectRows == 0 && IsDirect(rows, kPageTokens)) {
      return multiply(
          [&](int64_t g) { DirectProducts(x, rows, kPageTokens, part, head, g * part.group, 0); });
    }
#endif
    ReadWords(part, head, part.rows, whole, kPageTokens, s.words.data(), x.ahead);
    return multiply([&](int64_t g) {
      x.products.b = s.words.data() + g * x.products.steps * kPageTokens;
      CodeProducts(x, rows, whole);
    });
  }
  const float* const q = s.q.data() + first * layout.head_dim;
  if (rows <= kProductMostRows && part.bits == 16) {
    return ScoresOfHalves({.part = &part,
                           .head = head,
                           .a = q,
                           .a_stride = layout.head_dim,
                           .c = scores,
                           .c_stride = stride,
                           .tokens = tokens,
                           .ahead = &ahead},
                          rows);
  }
  PanelScores(q, layout.head_dim, rows, layout.head_dim, ReadK(part, head, whole, s.k.data()),
              whole, scores, stride);
}

// out += probabilities [rows, 64] times V of `tokens` tokens.
void PageValues(const KvPageLayout& layout, bool exact, const std::byte* head, const float* p,
                int64_t rows, int64_t tokens, AttentionScratch& s, float* out, int64_t out_stride,
                Ahead ahead) {
  const KvPart& part = layout.v;
  if (part.has_codes() && exact)
    return ExactValues(layout, head, p, rows, tokens, s, out, out_stride);
#if FRAMEQUILT_HAVE_AMX
  if (part.has_codes() && rows >= kAmxLeastRows)
    return AmxValues(layout, head, p, rows, tokens, s, out, out_stride, ahead);
#endif
  if (part.has_codes()) {
    const PageParams params = ReadParams(layout, part, head, s.scales.data(), s.zeros.data());
    CodeValues x;
    x.products.a = reinterpret_cast<const uint32_t*>(s.weight_codes.data());
    x.products.a_row = kPageTokens / 2;
    x.products.a_step = 1;
    x.products.b_step = out_stride;
    x.products.steps = (tokens + 1) / 2;
    x.zero_sums = s.zero_sums.data();
    x.steps = s.steps.data();
    x.c_stride = out_stride;
    x.ahead = ahead;
    const auto multiply = [&](const auto& products) {
      for (int64_t g = 0; g < part.groups; ++g) {
        const int64_t begin = g * part.group;
        WeightsOfRows(p, rows, params, g, tokens, s);
        x.c = out + begin;
        products(begin);
      }
    };
#if FRAMEQUILT_HAVE_DIRECT
    if (IsDirect(rows, part.group)) {
      return multiply([&](int64_t begin) {
        DirectProducts(x, rows, int64_t{part.group}, part, head, 0, begin);
      });
    }
#endif
    ReadWords(part, head, tokens, out_stride, out_stride, s.words.data(), x.ahead);
    return multiply([&](int64_t begin) {
      x.products.b = s.words.data() + begin;
      CodeProducts(x, rows, RoundUp(part.group, kLanes));
    });
  }
  // Whole vectors of floats would read past the page: panels then.
  if (rows <= kProductMostRows && part.bits == 16 && part.columns % kLanes == 0) {
    return ValuesOfHalves({.part = &part,
                           .head = head,
                           .a = p,
                           .a_stride = kBlock,
                           .c = out,
                           .c_stride = out_stride,
                           .tokens = tokens,
                           .ahead = &ahead},
                          rows);
  }
  PanelValues(p, rows, tokens, ReadV(part, head, tokens, out_stride, s.v.data()), out_stride, out,
              out_stride);
}

// --- A tile ------------------------------------------------------------------------------------

void Reserve(AttentionScratch& s, const KvPageLayout& layout, bool exact, int64_t rows) {
  const auto reserve = [](auto& buffer, int64_t count) {
    buffer.reserve(static_cast<size_t>(count));
  };
  const int64_t dims = layout.head_dim, stride = RoundUp(dims, kLanes);
  reserve(s.scores, rows * kBlock);
  reserve(s.state, SoftmaxState::Floats(rows, stride));
  reserve(s.chunk_state, SoftmaxState::Floats(rows, stride));
  reserve(s.factors, rows);
  if (layout.k.has_codes() || layout.v.has_codes()) {
    const int64_t groups = std::max(layout.k.groups, layout.v.groups);
    reserve(s.words, std::max(WordRows(dims) * kBlock, WordRows(kBlock) * stride));
    reserve(s.scales, groups * kBlock);
    reserve(s.zeros, groups * kBlock);
  }
  if (layout.k.has_codes() && !exact) {
    reserve(s.q_codes, rows * 2 * QueryWords(layout.k));
    reserve(s.q_sums, rows * layout.k.groups);
  } else {
    reserve(s.q, rows * dims);
    reserve(s.k, dims * kBlock);
  }
  if (layout.v.has_codes() && !exact) {
    reserve(s.weight_codes, rows * kBlock);
    reserve(s.zero_sums, rows);
    reserve(s.steps, rows);
  } else {
    reserve(s.v, kBlock * stride);
  }
#if FRAMEQUILT_HAVE_AMX
  if (!exact) ReserveBytes(layout, rows, s);
#endif
}

// Consecutive rows [row_begin, row_end) of one sequence, with all query heads of a kv head. Rows of
// the tile are (row, head), heads inside.
struct Tile {
  const ops::AttentionArgs& args;
  AttentionScratch& s;
  int64_t row_begin, row_end, kv_head;
  int64_t dims, heads, rows;

  Tile(const ops::AttentionArgs& a, AttentionScratch& scratch, int64_t begin, int64_t end,
       int64_t head)
      : args(a),
        s(scratch),
        row_begin(begin),
        row_end(end),
        kv_head(head),
        dims(a.kv.layout->head_dim),
        heads(a.heads / a.kv.layout->kv_heads),
        rows((end - begin) * heads) {}

  int64_t out_stride() const { return RoundUp(dims, kLanes); }
  int64_t chunks() const {
    return (args.begin + row_end + ops::kAttentionChunk - 1) / ops::kAttentionChunk;
  }
  int64_t place(int64_t r, int64_t stride) const {
    return (row_begin + r / heads) * stride + (kv_head * heads + r % heads) * dims;
  }
  // Rows before it see no token from `token` on.
  int64_t first_row(int64_t token) const {
    return std::max<int64_t>(0, token - (args.begin + row_begin)) * heads;
  }

  void LoadQueries() const {
    for (int64_t r = 0; r < rows; ++r)
      LoadQuery(*args.kv.layout, args.exact, args.q + place(r, args.q_stride), r, args.scale, s);
  }

  const std::byte* HeadOf(int64_t token) const {
    return args.kv.pages[token / kBlock] +
           args.kv.layout->head_bytes * static_cast<size_t>(kv_head);
  }

  // The softmax of one chunk, for the rows that see a token of it.
  void AddChunk(int64_t chunk, const SoftmaxState& state) const {
    const KvPageLayout& layout = *args.kv.layout;
    const int64_t first_visible = args.begin + row_begin + 1;  // of the first row
    const int64_t chunk_begin = chunk * ops::kAttentionChunk;
    const int64_t end = std::min(args.begin + row_end, chunk_begin + ops::kAttentionChunk);
    state.Reset(first_row(chunk_begin), rows);
    // Small pages are asked for one page ahead, their K while scores are computed and their V while
    // values are; of large ones it is the next part that is asked for.
    const bool far = layout.head_bytes <= kFarBytes;
    if (far) AheadOfV(layout, HeadOf(chunk_begin)).AskAll();
    for (int64_t begin = chunk_begin; begin < end; begin += kBlock) {
      const std::byte* const head = HeadOf(begin);
      const int64_t tokens = std::min(kBlock, end - begin), whole = RoundUp(tokens, kLanes);
      const int64_t first = first_row(begin), count = rows - first;
      const std::byte* const next =
          begin + kBlock < args.begin + row_end ? HeadOf(begin + kBlock) : nullptr;
      float* const scores = s.scores.data() + first * kBlock;
      PageScores(layout, args.exact, head, first, count, tokens, s, scores, kBlock,
                 !far              ? AheadOfV(layout, head)
                 : next == nullptr ? Ahead()
                                   : AheadOfK(layout, next));
      for (int64_t r = first; r < rows; ++r) {
        const int64_t visible = std::min(tokens, first_visible + r / heads - begin);
        state.AddScores(r, s.scores.data() + r * kBlock, visible, whole,
                        s.factors[static_cast<size_t>(r)]);
      }
      PageValues(layout, args.exact, head, scores, count, tokens, s,
                 state.out + first * state.out_stride, state.out_stride,
                 next == nullptr ? Ahead()
                 : far           ? AheadOfV(layout, next)
                                 : AheadOfK(layout, next));
    }
  }

  void Finish(const SoftmaxState& state) const {
    for (int64_t r = 0; r < rows; ++r) state.Finish(r, dims, args.out + place(r, args.out_stride));
  }

  void RunAll() const {
    LoadQueries();
    const SoftmaxState total(s.state.data(), rows, out_stride());
    AddChunk(0, total);
    const SoftmaxState part(s.chunk_state.data(), rows, out_stride());
    for (int64_t chunk = 1; chunk < chunks(); ++chunk) {
      AddChunk(chunk, part);
      for (int64_t r = first_row(chunk * ops::kAttentionChunk); r < rows; ++r)
        total.Merge(r, part, r);
    }
    Finish(total);
  }
};

// --- Sharing the work ----------------------------------------------------------------------------

// How one sequence is cut into tiles.
struct AttentionCut {
  int64_t tile_rows, tiles;  // query rows
  int64_t kv_heads, items;

  explicit AttentionCut(const ops::AttentionArgs& args) {
    kv_heads = args.kv.layout->kv_heads;
    tile_rows = std::max<int64_t>(1, kAttentionTileRows * kv_heads / args.heads);
    tiles = (args.rows + tile_rows - 1) / tile_rows;
    items = tiles * kv_heads;
  }

  Tile tile(const ops::AttentionArgs& args, AttentionScratch& scratch, int64_t index) const {
    // Last rows first: they see most, and the end of the loop should be made of small items.
    const int64_t at = tiles - 1 - index / kv_heads;
    return Tile(args, scratch, at * tile_rows, std::min(args.rows, (at + 1) * tile_rows),
                index % kv_heads);
  }
};

// Tiles of few rows over many pages: rounds of chunks, each chunk with a state of its own, merged
// in order by the caller between the rounds.
void AttendInChunks(std::span<const ops::AttentionArgs> list, int64_t tiles,
                    std::vector<AttentionScratch>& scratch, ThreadPool& pool) {
  int64_t most_rows = 0, most_chunks = 0, stride = 0;
  const auto tile_at = [&](int64_t index, AttentionScratch& s) {
    const ops::AttentionArgs* args = list.data();
    for (; index >= AttentionCut(*args).items; ++args) index -= AttentionCut(*args).items;
    return AttentionCut(*args).tile(*args, s, index);
  };
  for (int64_t i = 0; i < tiles; ++i) {
    const Tile tile = tile_at(i, scratch[0]);
    most_rows = std::max(most_rows, tile.rows);
    most_chunks = std::max(most_chunks, tile.chunks());
    stride = std::max(stride, tile.out_stride());
  }
  // A number of states that does not grow with the length: memory is taken once.
  const int64_t per_round = std::max<int64_t>(1, kRoundItems * pool.threads() / tiles);
  const int64_t state_floats = SoftmaxState::Floats(most_rows, stride);
  static thread_local AlignedBuffer<float> memory;  // of the caller: totals, then states
  memory.reserve(static_cast<size_t>((kRoundItems + 2) * pool.threads() * state_floats));
  float* const states = memory.data();  // workers would see a `memory` of their own
  const auto state_at = [&](int64_t index, const Tile& tile) {
    return SoftmaxState(states + index * state_floats, tile.rows, tile.out_stride());
  };
  for (int64_t begin = 0; begin < most_chunks; begin += per_round) {
    pool.parallel_for(tiles * per_round, [&](int64_t item, int thread) {
      const Tile tile = tile_at(item / per_round, scratch[static_cast<size_t>(thread)]);
      const int64_t chunk = begin + item % per_round;
      if (chunk >= tile.chunks()) return;
      tile.LoadQueries();
      tile.AddChunk(chunk, state_at(tiles + item, tile));
    });
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile tile = tile_at(i, scratch[0]);
      const SoftmaxState total = state_at(i, tile);
      if (begin == 0) total.Reset(0, tile.rows);
      const int64_t end = std::min(tile.chunks(), begin + per_round);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const SoftmaxState part = state_at(tiles + i * per_round + chunk - begin, tile);
        for (int64_t r = tile.first_row(chunk * ops::kAttentionChunk); r < tile.rows; ++r)
          total.Merge(r, part, r);
      }
      if (end == tile.chunks() && begin < end) tile.Finish(total);
    }
  }
}

void Attention(std::span<const ops::AttentionArgs> list, ThreadPool& pool) {
  int64_t items = 0, most_rows = 0, most_tokens = 0;
  for (const ops::AttentionArgs& args : list) {
    const AttentionCut cut(args);
    items += cut.items;
    const int64_t tile_rows = std::min(args.rows, cut.tile_rows);
    most_rows = std::max(most_rows, tile_rows * args.heads / cut.kv_heads);
    most_tokens = std::max(most_tokens, args.begin + args.rows);
  }
  if (items == 0) return;
  std::vector<AttentionScratch>& scratch = attention_scratch(pool.threads());
  for (AttentionScratch& s : scratch) {
    for (const ops::AttentionArgs& args : list) Reserve(s, *args.kv.layout, args.exact, most_rows);
  }
  if (pool.threads() > 1 && items < 2 * pool.threads() && most_rows <= kSplitRows &&
      most_tokens > ops::kAttentionChunk) {
    return AttendInChunks(list, items, scratch, pool);
  }
  pool.parallel_for(items, [&](int64_t item, int thread) {
    for (const ops::AttentionArgs& args : list) {
      const AttentionCut cut(args);
      if (item < cut.items)
        return cut.tile(args, scratch[static_cast<size_t>(thread)], item).RunAll();
      item -= cut.items;
    }
  });
}

// --- Importance ------------------------------------------------------------------------------

// Mean-free sum over the heads of one kv head and the queries: part [length].
void ImportanceHead(const ops::ImportanceArgs& args, int64_t kv_head, AttentionScratch& s,
                    float* part) {
  const DF df;
  const KvPageLayout& layout = *args.kv.layout;
  const int64_t dims = layout.head_dim, length = args.kv.length, queries = args.queries;
  const int64_t heads = args.heads / layout.kv_heads;
  const int64_t rows = heads * queries, stride = RoundUp(length, kBlock);
  for (int64_t r = 0; r < rows; ++r) {  // queries inside heads
    const float* const q =
        args.q + r % queries * args.q_stride + (kv_head * heads + r / queries) * dims;
    LoadQuery(layout, args.exact, q, r, args.scale, s);
  }
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const std::byte* const head =
        args.kv.pages[begin / kBlock] + layout.head_bytes * static_cast<size_t>(kv_head);
    PageScores(layout, args.exact, head, 0, rows, std::min(kBlock, length - begin), s,
               s.scores.data() + begin, stride, {});
  }
  std::fill_n(part, length, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    float* const scores = s.scores.data() + r * stride;
    const int64_t visible = length - queries + r % queries + 1;
    const float most =
        ScaleAndMax(scores, visible, s.factors[static_cast<size_t>(r)], kLowestScore);
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
  const int64_t rows = args.heads / kv_heads * args.queries;
  std::vector<AttentionScratch>& scratch = attention_scratch(pool.threads());
  for (AttentionScratch& s : scratch) {
    Reserve(s, *args.kv.layout, args.exact, rows);
    s.scores.reserve(static_cast<size_t>(rows * RoundUp(length, kBlock)));
  }
  pool.parallel_for(kv_heads, [&](int64_t head, int thread) {
    ImportanceHead(args, head, scratch[static_cast<size_t>(thread)], sums + head * length);
  });
  const float mean = 1.0f / static_cast<float>(args.heads * args.queries);
  for (int64_t t = 0; t < length; ++t) {
    float sum = 0.0f;
    for (int64_t head = 0; head < kv_heads; ++head) sum += sums[head * length + t];
    args.out[t] = sum * mean;
  }
}

#else  // one-lane targets: never chosen, see simd_targets()

void Attention(std::span<const ops::AttentionArgs> list, ThreadPool& pool) {
  scalar_kernels().attention(list, pool);
}
void Importance(const ops::ImportanceArgs& args, ThreadPool& pool) {
  scalar_kernels().importance(args, pool);
}

#endif
}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(Attention);
HWY_EXPORT(Importance);

void FRAMEQUILT_DOT_NAMESPACE::fill_attention_kernels(Kernels& kernels) {
  kernels.attention = &HWY_DYNAMIC_DISPATCH(Attention);
  kernels.importance = &HWY_DYNAMIC_DISPATCH(Importance);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
