// Linear kernels: float32 activations times f32, bf16, 8-bit or 4-bit weights, dequantized to
// float32 on the way. Two regimes with the same arithmetic per output (ops/ops.h): few rows stream
// the packed weights once through registers; many rows dequantize panels of columns into cache and
// multiply them in register blocks. Scratch is per thread and kept. Called by the engine thread,
// runs on the pool.
#include <algorithm>
#include <array>
#include <cstring>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/core/aligned.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/linear.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

using quant::kTileRows;
using quant::LinearWeights;

constexpr int kBlockBytes = 32;  // 8 rows of a tile

// --- Reading tiles ---------------------------------------------------------------------------
//
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

HWY_INLINE VF LoadScales(const LinearWeights& w, int64_t unit, int64_t group) {
  const int64_t stride = int64_t{w.groups} * kTileRows;
  if (w.format.scale == DType::kF32) {
    const auto* scales = static_cast<const float*>(w.scales) + group * kTileRows;
    return LoadTileVector(scales, stride, unit,
                          [](const float* at) FRAMEQUILT_INLINE { return hn::LoadU(DTile(), at); });
  }
  const auto* scales = static_cast<const hwy::float16_t*>(w.scales) + group * kTileRows;
  return LoadTileVector(scales, stride, unit, [](const hwy::float16_t* at) FRAMEQUILT_INLINE {
    return hn::PromoteTo(DTile(), hn::LoadU(hn::Rebind<hwy::float16_t, DTile>(), at));
  });
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

// --- Weight formats --------------------------------------------------------------------------
//
// A format turns one block (a word per row) into kInputs vectors of weights.

struct F32Format {
  static constexpr int kInputs = 1;
  static constexpr bool kGroups = false;
  struct Group {};
  static HWY_INLINE Group LoadGroup(const LinearWeights&, int64_t, int64_t) { return {}; }
  struct Block {
    VU raw;
  };
  static HWY_INLINE Block Open(VU raw) { return {raw}; }
  template <int kInput>
  static HWY_INLINE VF Weight(const Block& b, const Group&) {
    return hn::BitCast(DF(), b.raw);
  }
};

struct BF16Format {
  static constexpr int kInputs = 2;
  static constexpr bool kGroups = false;
  struct Group {};
  static HWY_INLINE Group LoadGroup(const LinearWeights&, int64_t, int64_t) { return {}; }
  struct Block {
    VU raw;
  };
  static HWY_INLINE Block Open(VU raw) { return {raw}; }
  template <int kInput>
  static HWY_INLINE VF Weight(const Block& b, const Group&) {
    const VU bits =
        kInput == 0 ? hn::ShiftLeft<16>(b.raw) : hn::And(b.raw, hn::Set(DU(), 0xFFFF0000u));
    return hn::BitCast(DF(), bits);
  }
};

template <int kBits>
struct AffineFormat {
  static constexpr int kInputs = 32 / kBits;
  static constexpr bool kGroups = true;
  static constexpr int kPlaces = 16 / kBits;  // codes of a half word
  struct Group {
    VF scale;
    VF minus[kPlaces];
  };
  static HWY_INLINE Group LoadGroup(const LinearWeights& w, int64_t unit, int64_t group) {
    Group g;
    g.scale = LoadScales(w, unit, group);
    const VF zero = LoadZeros(w, unit, group);
    Unrolled<kPlaces>([&](auto i) FRAMEQUILT_INLINE {
      g.minus[i] = hn::Add(zero, hn::Set(DF(), static_cast<float>(1 << (23 - i * kBits))));
    });
    return g;
  }
  struct Block {
    VU halves[2];  // codes at bits 0..15
  };
  static HWY_INLINE Block Open(VU raw) { return {{raw, hn::ShiftRight<16>(raw)}}; }
  // 8 bits: input i is byte i. 4 bits: input i is the low nibble of byte i, input 4 + i the high
  // one.
  template <int kInput>
  static HWY_INLINE VF Weight(const Block& b, const Group& g) {
    constexpr int kBit = kInput % 4 * 8 + kInput / 4 * 4;
    constexpr int kShift = kBit % 16;
    const VF code = CodeMinusZero<kBits, kShift>(b.halves[kBit / 16], g.minus[kShift / kBits]);
    return hn::Mul(code, g.scale);
  }
};

template <class Format>
int64_t TileStride(const LinearWeights& w) {
  const int64_t in = Format::kGroups ? w.padded_in() : w.in;
  return (in + Format::kInputs - 1) / Format::kInputs * kBlockBytes;
}

template <class Format>
int64_t GroupSize(const LinearWeights& w) {
  return Format::kGroups ? w.group : w.in;
}

// --- Results ---------------------------------------------------------------------------------

// y[row][column..] = sum (+ bias) (+ old y), for the lanes that are real outputs.
HWY_INLINE void Finish(const ops::LinearArgs& args, int64_t row, int64_t column, VF sum) {
  const DF df;
  const LinearWeights& w = *args.w;
  float* const y = args.y + row * args.y_stride + column;
  const int64_t left = w.out - column;
  if (left >= kLanes) {
    if (w.bias != nullptr) sum = hn::Add(sum, hn::LoadU(df, w.bias + column));
    if (args.accumulate) sum = hn::Add(sum, hn::LoadU(df, y));
    hn::StoreU(sum, df, y);
    return;
  }
  HWY_ALIGN float lanes[kLanes];
  hn::Store(sum, df, lanes);
  for (int64_t i = 0; i < left; ++i) {
    float value = lanes[i];
    if (w.bias != nullptr) value += w.bias[column + i];
    y[i] = args.accumulate ? value + y[i] : value;
  }
}

// --- Few rows: weights through registers -----------------------------------------------------

// `count` <= kUnits units of columns from `unit` on, for all kRows rows: enough accumulators to
// hide the latency of the fused multiply-add. What is missing repeats the last unit and is not
// stored.
template <class Format, int kRows, int kUnits>
HWY_NOINLINE void StreamUnits(const ops::LinearArgs& args, int64_t unit, int64_t count) {
  const DF df;
  const LinearWeights& w = *args.w;
  constexpr int kInputs = Format::kInputs;
  const int64_t tile_stride = TileStride<Format>(w);
  const auto* const data = static_cast<const std::byte*>(w.data);
  const auto unit_of = [&](int64_t u) FRAMEQUILT_INLINE { return unit + std::min(u, count - 1); };
  VF acc[kRows * kUnits];
  Unrolled<kRows * kUnits>([&](auto i) FRAMEQUILT_INLINE { acc[i] = hn::Zero(df); });
  const float* HWY_RESTRICT x = args.x;
  const int64_t x_stride = args.x_stride;
  const int64_t group_size = GroupSize<Format>(w);
  int64_t group_index = 0;
  for (int64_t begin = 0; begin < w.in; begin += group_size, ++group_index) {
    const int64_t end = std::min<int64_t>(begin + group_size, w.in);
    typename Format::Group groups[kUnits];
    Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
      groups[u] = Format::LoadGroup(w, unit_of(u), group_index);
    });
    int64_t i = begin;
    const std::byte* block = data + begin / kInputs * kBlockBytes;
    for (; i + kInputs <= end; i += kInputs, block += kBlockBytes) {
      typename Format::Block blocks[kUnits];
      Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
        blocks[u] = Format::Open(LoadWords(block, tile_stride, unit_of(u)));
      });
      Unrolled<kInputs>([&](auto input) FRAMEQUILT_INLINE {
        // Whatever there are fewer of stays in registers.
        if constexpr (kRows < kUnits) {
          VF values[kRows];
          Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
            values[r] = hn::Set(df, x[r * x_stride + i + input]);
          });
          Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
            const VF weight = Format::template Weight<input>(blocks[u], groups[u]);
            Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
              acc[r * kUnits + u] = hn::MulAdd(values[r], weight, acc[r * kUnits + u]);
            });
          });
        } else {
          VF weights[kUnits];
          Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
            weights[u] = Format::template Weight<input>(blocks[u], groups[u]);
          });
          Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
            const VF value = hn::Set(df, x[r * x_stride + i + input]);
            Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
              acc[r * kUnits + u] = hn::MulAdd(value, weights[u], acc[r * kUnits + u]);
            });
          });
        }
      });
    }
    if (i < end) {  // the last, partial block: x ends with `in`
      HWY_ALIGN float weights[kInputs * kUnits * kLanes];
      Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
        const auto partial = Format::Open(LoadWords(block, tile_stride, unit_of(u)));
        Unrolled<kInputs>([&](auto input) FRAMEQUILT_INLINE {
          hn::Store(Format::template Weight<input>(partial, groups[u]), df,
                    weights + (input * kUnits + u) * kLanes);
        });
      });
      for (const float* weight = weights; i < end; ++i, weight += kUnits * kLanes) {
        Unrolled<kRows * kUnits>([&](auto j) FRAMEQUILT_INLINE {
          const VF value = hn::Set(df, x[j / kUnits * x_stride + i]);
          acc[j] = hn::MulAdd(value, hn::Load(df, weight + j % kUnits * kLanes), acc[j]);
        });
      }
    }
  }
  Unrolled<kRows * kUnits>([&](auto i) FRAMEQUILT_INLINE {
    if (i % kUnits < count) Finish(args, i / kUnits, (unit + i % kUnits) * kLanes, acc[i]);
  });
}

// All `count` units from `unit` on for one block of kRows rows.
template <class Format, int kRows>
void StreamBlock(const ops::LinearArgs& args, int64_t unit, int64_t count) {
  constexpr int kUnits = kRows <= 2 ? 4 : 2;
  for (int64_t u = 0; u < count; u += kUnits) {
    StreamUnits<Format, kRows, kUnits>(args, unit + u, std::min<int64_t>(kUnits, count - u));
  }
}

constexpr int64_t kStreamRows = 8;

// Rows go in one or two blocks; the second finds the step's weights in cache.
template <class Format>
void Stream(const ops::LinearArgs& args, ThreadPool& pool) {
  constexpr int64_t kStep = 4;  // units
  using BlockFn = void (*)(const ops::LinearArgs&, int64_t, int64_t);
  constexpr BlockFn kBlocks[] = {&StreamBlock<Format, 1>, &StreamBlock<Format, 2>,
                                 &StreamBlock<Format, 3>, &StreamBlock<Format, 4>,
                                 kManyRegisters           ? &StreamBlock < Format,
                                 kManyRegisters ? 8 : 4 > : nullptr};
  const bool eight = kManyRegisters && args.rows == kStreamRows;
  const int64_t first = eight || args.rows <= 4 ? args.rows : (args.rows + 1) / 2;
  const BlockFn run_first = kBlocks[eight ? 4 : first - 1];
  ops::LinearArgs rest = args;
  rest.x += first * args.x_stride;
  rest.y += first * args.y_stride;
  rest.rows -= first;
  const int64_t units = int64_t{args.w->tiles} * kTileRows / kLanes;
  const int64_t steps = (units + kStep - 1) / kStep;
  // Shares of consecutive columns: long streams, few hand-outs, yet a slow thread can be helped.
  const int64_t shares =
      std::min<int64_t>(steps, int64_t{pool.threads()} * (pool.threads() == 1 ? 1 : 8));
  pool.parallel_for(shares, [&](int64_t share, int) {
    const int64_t end = std::min(units, steps * (share + 1) / shares * kStep);
    for (int64_t unit = steps * share / shares * kStep; unit < end; unit += kStep) {
      const int64_t count = std::min(kStep, end - unit);
      run_first(args, unit, count);
      if (rest.rows > 0) kBlocks[rest.rows - 1](rest, unit, count);
    }
  });
}

// --- Many rows: panels in cache --------------------------------------------------------------

constexpr int64_t kPanelColumns = 2 * kLanes;
constexpr int64_t kGroupColumns = 64;                      // columns of one item of work
constexpr int64_t kInputBlock = kLanes == 16 ? 192 : 256;  // a panel of this many inputs fits L1
constexpr int64_t kRowBlock = 192;                         // rows of one item of work

// Weights [begin, end) x unit as float32 into panel[(i - begin) * stride]. `begin` is a multiple of
// kInputs.
template <class Format>
HWY_NOINLINE void DequantizeUnit(const LinearWeights& w, int64_t unit, int64_t begin, int64_t end,
                                 float* panel, int64_t stride) {
  const DF df;
  constexpr int kInputs = Format::kInputs;
  const int64_t tile_stride = TileStride<Format>(w);
  const int64_t group_size = GroupSize<Format>(w);
  const auto* block = static_cast<const std::byte*>(w.data) + begin / kInputs * kBlockBytes;
  const int64_t ahead = (end - begin) / kInputs * kBlockBytes;  // the next block of inputs
  for (int64_t i = begin; i < end;) {
    const int64_t group_index = i / group_size;
    const int64_t group_end = std::min(end, (group_index + 1) * group_size);
    const typename Format::Group group = Format::LoadGroup(w, unit, group_index);
    for (; i < group_end;
         i += kInputs, block += kBlockBytes) {  // may write past `end` within the last block
      const typename Format::Block opened = Format::Open(LoadWords(block, tile_stride, unit));
      PrefetchWords(block, tile_stride, unit, ahead);
      Unrolled<kInputs>([&](auto input) FRAMEQUILT_INLINE {
        hn::Store(Format::template Weight<input>(opened, group), df, panel);
        panel += stride;
      });
    }
  }
}

struct PanelScratch {
  AlignedBuffer<float> panel, sums, rows;
};

inline PanelScratch& ThreadScratch() {
  static thread_local PanelScratch scratch;
  scratch.panel.reserve((kInputBlock + 8) * kPanelColumns);
  scratch.sums.reserve(kRowBlock * kGroupColumns);
  return scratch;
}

// Rows that start a multiple of a page apart fall into the same few cache sets: such blocks are
// copied.
inline bool NeedsCopy(int64_t stride, int64_t rows) {
  return rows > 4 && (stride * static_cast<int64_t>(sizeof(float))) % 4096 < 128;
}

template <class Format>
void PanelItem(const ops::LinearArgs& args, int64_t row_begin, int64_t row_end,
               int64_t column_begin, int64_t column_end) {
  const DF df;
  const LinearWeights& w = *args.w;
  PanelScratch& scratch = ThreadScratch();
  const int64_t rows = row_end - row_begin;
  const float* const x = args.x + row_begin * args.x_stride;
  const bool copy = NeedsCopy(args.x_stride, rows);
  constexpr int64_t kCopyStride = kInputBlock + 16;
  if (copy) scratch.rows.reserve(static_cast<size_t>(kRowBlock * kCopyStride));
  for (int64_t begin = 0; begin < w.in; begin += kInputBlock) {
    const int64_t end = std::min<int64_t>(begin + kInputBlock, w.in);
    GemmBlock g;
    g.a = x + begin;
    g.a_stride = args.x_stride;
    if (copy) {
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(scratch.rows.data() + r * kCopyStride, x + r * args.x_stride + begin,
                    static_cast<size_t>(end - begin) * sizeof(float));
      }
      g.a = scratch.rows.data();
      g.a_stride = kCopyStride;
    }
    g.k = end - begin;
    g.first = begin == 0;
    g.b = scratch.panel.data();
    g.c_stride = kGroupColumns;
    for (int64_t column = column_begin; column < column_end; column += kPanelColumns) {
      const int64_t vectors = std::min(kPanelColumns, column_end - column) / kLanes;
      g.b_stride = vectors * kLanes;
      for (int64_t v = 0; v < vectors; ++v) {
        DequantizeUnit<Format>(w, column / kLanes + v, begin, end,
                               scratch.panel.data() + v * kLanes, g.b_stride);
      }
      g.c = scratch.sums.data() + (column - column_begin);
      if (vectors == 2) {
        GemmPanel<2>(g, rows);
      } else {
        GemmPanel<1>(g, rows);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* const sums = scratch.sums.data() + r * kGroupColumns;
    for (int64_t column = column_begin; column < column_end && column < w.out; column += kLanes) {
      Finish(args, row_begin + r, column, hn::Load(df, sums + column - column_begin));
    }
  }
}

template <class Format>
void Panels(const ops::LinearArgs& args, ThreadPool& pool) {
  const int64_t columns = int64_t{args.w->tiles} * kTileRows;
  const int64_t row_blocks = (args.rows + kRowBlock - 1) / kRowBlock;
  // Narrow linears on many threads: smaller items.
  int64_t width = kGroupColumns;
  while (width > kPanelColumns && (columns + width - 1) / width * row_blocks < 4 * pool.threads())
    width /= 2;
  const int64_t column_groups = (columns + width - 1) / width;
  pool.parallel_for(row_blocks * column_groups, [&](int64_t item, int) {
    const int64_t block = item / column_groups;
    const int64_t column = item % column_groups * width;
    PanelItem<Format>(args, args.rows * block / row_blocks, args.rows * (block + 1) / row_blocks,
                      column, std::min(columns, column + width));
  });
}

template <class Format>
void RunLinear(const ops::LinearArgs& args, ThreadPool& pool) {
  if (args.rows == 0) return;
  if (args.rows <= kStreamRows) return Stream<Format>(args, pool);
  Panels<Format>(args, pool);
}

void LinearF32(const ops::LinearArgs& args, ThreadPool& pool) { RunLinear<F32Format>(args, pool); }
void LinearBF16(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinear<BF16Format>(args, pool);
}
void LinearW8(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinear<AffineFormat<8>>(args, pool);
}
void LinearW4(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinear<AffineFormat<4>>(args, pool);
}

#else  // one-lane targets: never chosen, see simd_targets()

void LinearF32(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearBF16(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_bf16(args, pool);
}
void LinearW8(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_w8(args, pool);
}
void LinearW4(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_w4(args, pool);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(LinearF32);
HWY_EXPORT(LinearBF16);
HWY_EXPORT(LinearW8);
HWY_EXPORT(LinearW4);

void fill_linear_kernels(Kernels& kernels) {
  kernels.linear_f32 = &HWY_DYNAMIC_DISPATCH(LinearF32);
  kernels.linear_bf16 = &HWY_DYNAMIC_DISPATCH(LinearBF16);
  kernels.linear_w8 = &HWY_DYNAMIC_DISPATCH(LinearW8);
  kernels.linear_w4 = &HWY_DYNAMIC_DISPATCH(LinearW4);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
