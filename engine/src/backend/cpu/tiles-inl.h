// Reading the tiles of packed weights (engine/CONTRACT.md, 1.3), shared by the float32 and the
// integer linears. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_TILES_INL_H_
#undef FRAMEQUILT_CPU_TILES_INL_H_
#else
#define FRAMEQUILT_CPU_TILES_INL_H_
#endif

#include <algorithm>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "src/backend/cpu/math-inl.h"
#include "src/core/thread_pool.h"
#include "src/ops/ops.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

using quant::kTileRows;
using quant::LinearWeights;

constexpr int kBlockBytes = 32;  // 8 rows of a tile

// A unit is the kLanes output rows of one vector: half a tile, a tile, or two tiles that lie
// `tile_stride` apart.

// Loads one 4-byte word per lane from an array [tiles, ..., 8] of words.
HWY_INLINE VU LoadWords(const std::byte* tiles, int64_t tile_stride, int64_t unit) {
  const DU du;
  if constexpr (kLanes == 16) {
    const hn::Half<DU> dh;
    const auto* low = reinterpret_cast<const uint32_t*>(tiles + 2 * unit * tile_stride);
    const auto* high = reinterpret_cast<const uint32_t*>(tiles + (2 * unit + 1) * tile_stride);
    return hn::Combine(du, hn::LoadU(dh, high), hn::LoadU(dh, low));
  } else {
    constexpr int64_t kUnits = kTileRows / kLanes;
    const std::byte* at = tiles + unit / kUnits * tile_stride + unit % kUnits * kLanes * 4;
    return hn::LoadU(du, reinterpret_cast<const uint32_t*>(at));
  }
}

constexpr int64_t kTilesPerUnit = kLanes == 16 ? 2 : 1;

// Asks for the words of a unit that lie `ahead` bytes on. Harmless past the end of the tensor.
HWY_INLINE void PrefetchWords(const std::byte* tiles, int64_t tile_stride, int64_t unit,
                              int64_t ahead) {
  const int64_t tile = unit * kLanes / kTileRows;
  for (int64_t t = 0; t < kTilesPerUnit; ++t)
    hwy::Prefetch(tiles + (tile + t) * tile_stride + ahead);
}

// The same for any element type, converted to float32 by `load(pointer)`, which returns a vector of
// at most 8 lanes.
template <class T, class Load>
HWY_INLINE VF LoadTileVector(const T* tiles, int64_t tile_stride, int64_t unit, const Load& load) {
  if constexpr (kLanes == 16) {
    const DF df;
    return hn::Combine(df, load(tiles + (2 * unit + 1) * tile_stride),
                       load(tiles + 2 * unit * tile_stride));
  } else {
    constexpr int64_t kUnits = kTileRows / kLanes;
    return load(tiles + unit / kUnits * tile_stride + unit % kUnits * kLanes);
  }
}
using DTile = hn::CappedTag<float, kTileRows>;

// A vector of a table of the scales' type, [tiles, groups, 8].
HWY_INLINE VF LoadNumbers(const LinearWeights& w, const void* table, int64_t unit, int64_t group) {
  const int64_t stride = int64_t{w.groups} * kTileRows;
  if (w.format.scale == DType::kF32) {
    const auto* numbers = static_cast<const float*>(table) + group * kTileRows;
    return LoadTileVector(numbers, stride, unit,
                          [](const float* at) FRAMEQUILT_INLINE { return hn::LoadU(DTile(), at); });
  }
  const auto* numbers = static_cast<const hwy::float16_t*>(table) + group * kTileRows;
  return LoadTileVector(numbers, stride, unit, [](const hwy::float16_t* at) FRAMEQUILT_INLINE {
    return hn::PromoteTo(DTile(), hn::LoadU(hn::Rebind<hwy::float16_t, DTile>(), at));
  });
}

HWY_INLINE VF LoadScales(const LinearWeights& w, int64_t unit, int64_t group) {
  return LoadNumbers(w, w.scales, unit, group);
}

HWY_INLINE VF LoadZeros(const LinearWeights& w, int64_t unit, int64_t group) {
  if (w.zeros == nullptr) return hn::Set(DF(), static_cast<float>(1 << (w.format.bits - 1)));
  const int64_t stride = int64_t{w.groups} * kTileRows;
  return LoadTileVector(
      w.zeros + group * kTileRows, stride, unit, [](const uint8_t* at) FRAMEQUILT_INLINE {
        const hn::Rebind<int32_t, DTile> di;
        return hn::ConvertTo(DTile(),
                             hn::PromoteTo(di, hn::LoadU(hn::Rebind<uint8_t, DTile>(), at)));
      });
}

// --- Codes -----------------------------------------------------------------------------------

constexpr int kHalfInputs = 16;  // of a superblock of 32
constexpr int kHalfWords = kHalfInputs / 4;

// Bytes between the superblocks of a tile.
constexpr int64_t SuperblockBytes(int bits) { return int64_t{kBlockBytes} * bits; }

// The bits [kFrom, kFrom + kBits) of every byte, moved to kTo.
template <int kBits, int kFrom, int kTo>
HWY_INLINE VU MovedBits(VU word) {
  constexpr uint32_t kMask = (((1u << kBits) - 1) << kTo) * 0x01010101u;
  if constexpr (kFrom > kTo) word = hn::ShiftRight<kFrom - kTo>(word);
  if constexpr (kFrom < kTo) word = hn::ShiftLeft<kTo - kFrom>(word);
  return hn::And(word, hn::Set(DU(), kMask));
}

// The codes of half `half` of a superblock as bytes: word j holds inputs 4j..4j+3 of the half, for
// the rows of a unit.
template <int kBits>
HWY_INLINE void LoadCodes(const std::byte* superblock, int half, int64_t tile_stride, int64_t unit,
                          VU (&words)[kHalfWords]) {
  const auto load = [&](int block) FRAMEQUILT_INLINE {
    return LoadWords(superblock + block * kBlockBytes, tile_stride, unit);
  };
  if constexpr (kBits == 8) {
    Unrolled<4>([&](auto j) FRAMEQUILT_INLINE { words[j] = load(4 * half + j); });
    return;
  }
  if constexpr (kBits >= 4) {  // a plane of 4 bits: two blocks a half
    Unrolled<2>([&](auto b) FRAMEQUILT_INLINE {
      const VU raw = load(2 * half + b);
      words[2 * b] = MovedBits<4, 0, 0>(raw);
      words[2 * b + 1] = MovedBits<4, 4, 0>(raw);
    });
  } else {  // a plane of 2 bits: one block a half
    const VU raw = load(half);
    Unrolled<4>([&](auto j) FRAMEQUILT_INLINE { words[j] = MovedBits<2, 2 * j, 0>(raw); });
  }
  if constexpr (kBits == 6) {  // and one of 2
    const VU raw = load(4 + half);
    Unrolled<4>([&](auto j) FRAMEQUILT_INLINE {
      words[j] = hn::Or(words[j], MovedBits<2, 2 * j, 4>(raw));
    });
  }
  if constexpr (kBits == 5 || kBits == 3) {  // and one of 1: both halves in one block
    const VU raw = hn::ShiftRightSame(load(kBits - 1), 4 * half);
    Unrolled<4>([&](auto j) FRAMEQUILT_INLINE {
      words[j] = hn::Or(words[j], MovedBits<1, j, kBits - 1>(raw));
    });
  }
}

// --- What is needed next -------------------------------------------------------------------------

// The packed weights of the panel after this one: a range of bytes of some tiles. They are asked
// for a few lines at a time while this panel is multiplied, into the second cache level, because
// the first is full. A panel is made of pieces too short for a hardware prefetcher, and without
// this unpacking waits for memory.
struct WeightsAhead {
  const std::byte* first = nullptr;
  int64_t tile_stride = 0, tiles = 0;
  int64_t bytes = 0;  // of each tile
  int64_t tile = 0, offset = 0;

  int64_t lines() const { return tiles * ((bytes + 63) / 64); }
  HWY_INLINE void Ask(int64_t lines) {
    for (; lines > 0 && tile < tiles; --lines) {
      __builtin_prefetch(first + tile * tile_stride + offset, 0, 2);
      offset += 64;
      if (offset >= bytes) {
        offset = 0;
        ++tile;
      }
    }
  }
};

// Inputs [begin, end) of the tiles of `columns` columns from `column` on. Nothing behind the last
// column.
inline WeightsAhead AskFor(const LinearWeights& w, int64_t tile_stride, int64_t bytes_per_32,
                           int64_t column, int64_t columns, int64_t begin, int64_t end) {
  WeightsAhead ahead;
  const int64_t tile = column / kTileRows;
  ahead.first =
      static_cast<const std::byte*>(w.data) + tile * tile_stride + begin / 32 * bytes_per_32;
  ahead.tile_stride = tile_stride;
  ahead.tiles = std::clamp<int64_t>(w.tiles - tile, 0, columns / kTileRows);
  ahead.bytes = (end - begin + 31) / 32 * bytes_per_32;
  return ahead;
}

// Rows of a panel's results are far apart, and each begins with a miss: they are asked for while
// the sums are still growing.
HWY_INLINE void AskForOutputs(const ops::LinearArgs& args, int64_t row, int64_t rows,
                              int64_t column_begin, int64_t column_end) {
  const float* y = args.y + row * args.y_stride;
  for (; rows > 0; --rows, y += args.y_stride) {
    for (int64_t column = column_begin; column < column_end; column += 16)
      __builtin_prefetch(y + column, 0, 2);
  }
}

// --- Results ---------------------------------------------------------------------------------

// Out of line: every kernel ends with this.
inline HWY_NOINLINE VF Activated(model::Activation kind, VF x) {
  switch (kind) {
    case model::Activation::kRelu:
      return Relu(x);
    case model::Activation::kGelu:
      return Gelu(x);
    case model::Activation::kGeluTanh:
      return GeluTanh(x);
    case model::Activation::kSilu:
      return Silu(x);
  }
  return x;
}

// y[row][column..] = act(sum + bias) and so on (ops::LinearArgs), for the lanes that are real
// outputs.
HWY_INLINE void Finish(const ops::LinearArgs& args, int64_t row, int64_t column, VF sum) {
  const DF df;
  const LinearWeights& w = *args.w;
  float* const y = args.y + row * args.y_stride + column;
  const int64_t left = w.out - column;
  if (left >= kLanes) {
    if (w.bias != nullptr) sum = hn::Add(sum, hn::LoadU(df, w.bias + column));
    if (args.activation) sum = Activated(*args.activation, sum);
    if (args.accumulate) sum = hn::Add(sum, hn::LoadU(df, y));
    if (args.multiply) sum = hn::Mul(sum, hn::LoadU(df, y));
    hn::StoreU(sum, df, y);
    return;
  }
  HWY_ALIGN float lanes[kLanes];
  hn::Store(sum, df, lanes);
  for (int64_t i = 0; i < left && w.bias != nullptr; ++i) lanes[i] += w.bias[column + i];
  if (args.activation) hn::Store(Activated(*args.activation, hn::Load(df, lanes)), df, lanes);
  for (int64_t i = 0; i < left; ++i)
    y[i] = args.accumulate ? lanes[i] + y[i] : args.multiply ? lanes[i] * y[i] : lanes[i];
}

// --- Sharing the work ----------------------------------------------------------------------------

// Where the linears of a call (ops::LinearArgs::next) that are computed together end: `first` and
// those that multiply what it has written.
inline const ops::LinearArgs* EndOfRun(const ops::LinearArgs* first) {
  do first = first->next;
  while (first != nullptr && first->multiply);
  return first;
}

// For each of `blocks`, calls body(linear, block, piece) for the pieces [0, pieces(linear)) of all
// linears of a call. Neighbours go to the same thread; the linears of a run have the same pieces,
// and one follows the other.
template <class Pieces, class Body>
void ForPieces(const ops::LinearArgs& args, ThreadPool& pool, int64_t blocks, const Pieces& pieces,
               const Body& body) {
  int64_t total = 0;
  for (const ops::LinearArgs* run = &args; run != nullptr; run = EndOfRun(run))
    total += pieces(*run);
  pool.parallel_streams(blocks * total, [&](int64_t item, int) {
    int64_t piece = item % total;
    const ops::LinearArgs* run = &args;
    for (int64_t n = pieces(*run); piece >= n; n = pieces(*run)) {
      piece -= n;
      run = EndOfRun(run);
    }
    const ops::LinearArgs* const end = EndOfRun(run);
    for (; run != end; run = run->next) body(*run, item / total, piece);
  });
}

constexpr int64_t kStreamStep = 4;  // units

// Calls run(linear, unit, count) for all units of all linears of a call, in steps: few rows, where
// weights are read once. Each thread reads consecutive columns.
template <class Run>
void StreamSteps(const ops::LinearArgs& args, ThreadPool& pool, const Run& run) {
  const auto units = [](const ops::LinearArgs& one) {
    return int64_t{one.w->tiles} * kTileRows / kLanes;
  };
  ForPieces(
      args, pool, 1,
      [&](const ops::LinearArgs& one) { return (units(one) + kStreamStep - 1) / kStreamStep; },
      [&](const ops::LinearArgs& one, int64_t, int64_t step) {
        const int64_t unit = step * kStreamStep;
        run(one, unit, std::min(kStreamStep, units(one) - unit));
      });
}

// Calls run(linear, row_begin, row_end, column_begin, column_end, next_column) for all rows and
// columns of all linears of a call: many rows. A thread keeps to its rows as long as there are
// enough of them: other ops share rows in the same way, and what one has written is then in the
// cache of the core that reads it. `next_column` is where this thread is likely to go on.
template <class Run>
void PanelPieces(const ops::LinearArgs& args, ThreadPool& pool, int64_t most_rows,
                 int64_t most_columns, int64_t least_columns, const Run& run) {
  constexpr int64_t kWorthUnpacking = 128;  // rows
  const int64_t own = std::clamp<int64_t>(args.rows / kWorthUnpacking, 1, pool.threads());
  const int64_t blocks = own * ((args.rows + own * most_rows - 1) / (own * most_rows));
  const auto columns = [](const ops::LinearArgs& one) { return int64_t{one.w->tiles} * kTileRows; };
  // Narrow linears on many threads: smaller pieces.
  const auto width = [&](const ops::LinearArgs& one) {
    int64_t w = most_columns;
    while (w > least_columns && (columns(one) + w - 1) / w * blocks < 4 * pool.threads()) w /= 2;
    return w;
  };
  const auto groups = [&](const ops::LinearArgs& one) {
    const int64_t w = width(one);
    return (columns(one) + w - 1) / w;
  };
  ForPieces(args, pool, blocks, groups,
            [&](const ops::LinearArgs& one, int64_t block, int64_t group) {
              const int64_t w = width(one), column = group * w;
              run(one, args.rows * block / blocks, args.rows * (block + 1) / blocks, column,
                  std::min(columns(one), column + w), (group + 1) % groups(one) * w);
            });
}

// One item of that work.
struct PanelPiece {
  const ops::LinearArgs& args;
  int64_t row_begin, row_end, column_begin, column_end, next_column;
};

// The panels of one item: blocks of `inputs_at_once` of `inputs` inputs times `columns_at_once`
// columns. For each calls unpack(begin, end, column) and multiply(begin, end, column, before,
// after), which has to call before(first, count) and after(first, count) around the products of
// rows [first, first + count) of the item. finish(row, column) writes the outputs of a vector of
// columns (counted within the item) of a row. ask_for(column, begin): the weights of a panel.
template <class AskFor, class Unpack, class Multiply, class FinishRow>
HWY_INLINE void ForPanels(const PanelPiece& item, int64_t inputs, int64_t inputs_at_once,
                          int64_t columns_at_once, const AskFor& ask_for, const Unpack& unpack,
                          const Multiply& multiply, const FinishRow& finish) {
  const int64_t rows = item.row_end - item.row_begin;
  const int64_t out_end = std::min<int64_t>(item.column_end, item.args.w->out);
  for (int64_t begin = 0; begin < inputs; begin += inputs_at_once) {
    const int64_t end = std::min(begin + inputs_at_once, inputs);
    for (int64_t column = item.column_begin; column < item.column_end; column += columns_at_once) {
      unpack(begin, end, column);
      const bool more_columns = column + columns_at_once < item.column_end;
      WeightsAhead ahead = more_columns   ? ask_for(column + columns_at_once, begin)
                           : end < inputs ? ask_for(item.column_begin, end)
                                          : ask_for(item.next_column, 0);
      const int64_t lines = ahead.lines();
      const bool last = !more_columns && end == inputs;
      // With the last products, a tile's outputs are asked for before it and written after it, so
      // that the writing of one goes on while the next one is multiplied.
      const auto before = [&](int64_t first, int64_t count) {
        ahead.Ask((lines * count + rows - 1) / rows);
        if (last)
          AskForOutputs(item.args, item.row_begin + first, count, item.column_begin, out_end);
      };
      const auto after = [&](int64_t first, int64_t count) {
        if (!last) return;
        for (int64_t r = first; r < first + count; ++r) {
          for (int64_t c = 0; c < out_end - item.column_begin; c += kLanes) finish(r, c);
        }
      };
      multiply(begin, end, column, before, after);
    }
  }
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
