// Float32 linears of the formats that are fastest: f32, bf16, 8-bit and 4-bit weights.

#include <algorithm>
#include <cstring>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/linear.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/linear-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

struct PanelScratch {
  AlignedBuffer<float> panel, sums, rows;
};

PanelScratch& ThreadScratch() {
  static thread_local PanelScratch scratch;
  scratch.panel.reserve((kInputBlock + kHalfInputs) * kPanelColumns);
  scratch.sums.reserve(kRowBlock * kGroupColumns);
  return scratch;
}

// Rows that start a multiple of a page apart fall into the same few cache sets: such blocks are
// copied.
bool NeedsCopy(int64_t stride, int64_t rows) {
  return rows > 4 && (stride * static_cast<int64_t>(sizeof(float))) % 4096 < 128;
}

// `next_column`: of the item that this thread is likely to get next.
void PanelItem(const ops::LinearArgs& args, const PanelFormat& format, int64_t row_begin,
               int64_t row_end, int64_t column_begin, int64_t column_end, int64_t next_column) {
  const DF df;
  const LinearWeights& w = *args.w;
  PanelScratch& scratch = ThreadScratch();
  const int64_t rows = row_end - row_begin;
  const float* const x = args.x + row_begin * args.x_stride;
  const bool copy = NeedsCopy(args.x_stride, rows);
  constexpr int64_t kCopyStride = kInputBlock + 16;
  if (copy) scratch.rows.reserve(static_cast<size_t>(kRowBlock * kCopyStride));
  const auto ask_for = [&](int64_t column, int64_t begin) {
    return AskFor(w, format.tile_stride, format.bytes_per_32, column, kPanelColumns, begin,
                  std::min<int64_t>(begin + kInputBlock, w.in));
  };
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
        format.dequantize(w, column / kLanes + v, begin, end, scratch.panel.data() + v * kLanes,
                          g.b_stride);
      }
      g.c = scratch.sums.data() + (column - column_begin);
      WeightsAhead ahead = column + kPanelColumns < column_end
                               ? ask_for(column + kPanelColumns, begin)
                           : end < w.in ? ask_for(column_begin, end)
                                        : ask_for(next_column, 0);
      const int64_t lines = ahead.lines();
      const bool last = column + kPanelColumns >= column_end && end == w.in;
      // With the last products, a tile's outputs are asked for before it and written after it, so
      // that the writing of one goes on while the next one is multiplied.
      const int64_t out_end = std::min<int64_t>(column_end, w.out);
      const auto before = [&](int64_t first, int64_t count) {
        ahead.Ask((lines * count + rows - 1) / rows);
        if (last) AskForOutputs(args, row_begin + first, count, column_begin, out_end);
      };
      const auto after = [&](int64_t first, int64_t count) {
        if (!last) return;
        for (int64_t r = first; r < first + count; ++r) {
          const float* const sums = scratch.sums.data() + r * kGroupColumns;
          for (int64_t c = column_begin; c < out_end; c += kLanes)
            Finish(args, row_begin + r, c, hn::Load(df, sums + c - column_begin));
        }
      };
      if (vectors == 2) {
        GemmPanel<2>(g, rows, before, after);
      } else {
        GemmPanel<1>(g, rows, before, after);
      }
    }
  }
}

void RunPanels(const ops::LinearArgs& args, ThreadPool& pool, const PanelFormat& format) {
  PanelPieces(args, pool, kRowBlock, kGroupColumns, kPanelColumns,
              [&](const ops::LinearArgs& one, int64_t row_begin, int64_t row_end, int64_t begin,
                  int64_t end,
                  int64_t next) { PanelItem(one, format, row_begin, row_end, begin, end, next); });
}

void LinearF32(const ops::LinearArgs& args, ThreadPool& pool) { RunLinear<F32Format>(args, pool); }
void LinearBF16(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinear<BF16Format>(args, pool);
}
void LinearW8(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinear<AffineFormat<8, false>>(args, pool);
}
void LinearW4(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinear<AffineFormat<4, false>>(args, pool);
}

#else  // one-lane targets: never chosen, see simd_targets()

void LinearF32(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearBF16(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearW8(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
}
void LinearW4(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_f32(args, pool);
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
  kernels.linear_affine[8] = &HWY_DYNAMIC_DISPATCH(LinearW8);
  kernels.linear_affine[4] = &HWY_DYNAMIC_DISPATCH(LinearW4);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
