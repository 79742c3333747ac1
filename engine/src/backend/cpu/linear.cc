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
  scratch.panel.reserve((kMostInputs + kHalfInputs) * kPanelColumns);
  scratch.sums.reserve(kRowBlock * kGroupColumns);
  return scratch;
}

// Rows that start a multiple of a page apart fall into the same few cache sets: such blocks are
// copied.
bool NeedsCopy(int64_t stride, int64_t rows) {
  return rows > 4 && (stride * static_cast<int64_t>(sizeof(float))) % 4096 < 128;
}

void PanelItem(const PanelPiece& item, const PanelFormat& format) {
  const ops::LinearArgs& args = item.args;
  const LinearWeights& w = *args.w;
  PanelScratch& scratch = ThreadScratch();
  const int64_t rows = item.row_end - item.row_begin;
  const float* const x = args.x + item.row_begin * args.x_stride;
  const int64_t inputs = PanelInputs(rows);
  const bool copy = NeedsCopy(args.x_stride, rows);
  constexpr int64_t kCopyStride = kMostInputs + 16;
  if (copy) scratch.rows.reserve(static_cast<size_t>(kRowBlock * kCopyStride));
  const auto vectors_of = [&](int64_t column) {
    return std::min(kPanelColumns, item.column_end - column) / kLanes;
  };
  ForPanels(
      item, w.in, inputs, kPanelColumns,
      [&](const LinearWeights& next, int64_t column, int64_t begin) {
        return AskFor(next, format.tile_stride, format.bytes_per_32, column, kPanelColumns, begin,
                      std::min<int64_t>(begin + inputs, w.in));
      },
      [&](int64_t begin, int64_t end, int64_t column) {
        if (copy && column == item.column_begin) {
          for (int64_t r = 0; r < rows; ++r) {
            std::memcpy(scratch.rows.data() + r * kCopyStride, x + r * args.x_stride + begin,
                        static_cast<size_t>(end - begin) * sizeof(float));
          }
        }
        const int64_t vectors = vectors_of(column);
        for (int64_t v = 0; v < vectors; ++v) {
          format.dequantize(w, column / kLanes + v, begin, end, scratch.panel.data() + v * kLanes,
                            vectors * kLanes);
        }
      },
      [&](int64_t begin, int64_t end, int64_t column, const auto& before, const auto& after) {
        GemmBlock g;
        g.a = copy ? scratch.rows.data() : x + begin;
        g.a_stride = copy ? kCopyStride : args.x_stride;
        g.k = end - begin;
        g.first = begin == 0;
        g.b = scratch.panel.data();
        g.b_stride = vectors_of(column) * kLanes;
        g.c = scratch.sums.data() + (column - item.column_begin);
        g.c_stride = kGroupColumns;
        if (vectors_of(column) == 2) {
          GemmPanel<2>(g, rows, before, after);
        } else {
          GemmPanel<1>(g, rows, before, after);
        }
      },
      [&](int64_t first, int64_t count, int64_t columns) {
        FinishRows(args, item.row_begin + first, count, item.column_begin, columns,
                   scratch.sums.data() + first * kGroupColumns, kGroupColumns);
      });
}

void RunPanels(const ops::LinearArgs& args, ThreadPool& pool, const PanelFormat& format) {
  PanelPieces(args, pool, kWorthUnpacking, kRowBlock, kGroupColumns, kPanelColumns, 1,
              [&](const PanelPiece& piece) { PanelItem(piece, format); });
}

void LinearF32(const ops::LinearArgs& args, ThreadPool& pool) { RunLinear<F32Format>(args, pool); }
void LinearBF16(const ops::LinearArgs& args, ThreadPool& pool) {
  RunLinear<BF16Format>(args, pool);
}
void LinearW8(const ops::LinearArgs& args, ThreadPool& pool) {
  RunCodes<AffineFormat, 8>(args, pool);
}
void LinearW4(const ops::LinearArgs& args, ThreadPool& pool) {
  RunCodes<AffineFormat, 4>(args, pool);
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
