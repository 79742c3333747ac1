// Float32 linears as templates over the weight format: weights are dequantized to float32 on the
// way. Two regimes with the same arithmetic per output (ops/ops.h): few rows stream the packed
// weights once through registers; many rows dequantize panels of columns into cache and multiply
// them in register blocks. Scratch is per thread and kept. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_LINEAR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_LINEAR_INL_H_
#undef FRAMEQUILT_CPU_LINEAR_INL_H_
#else
#define FRAMEQUILT_CPU_LINEAR_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstring>

#include "hwy/highway.h"
#include "src/backend/cpu/pieces-inl.h"
#include "src/core/aligned.h"
#include "src/quant/activations.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// --- Weight formats --------------------------------------------------------------------------
//
// A format turns one block of kInputs inputs into as many vectors of weights. Open() finds the
// block that begins at input `i`.

struct F32Format {
  static constexpr int kInputs = 1;
  static constexpr bool kGroups = false;
  struct Group {};
  static HWY_INLINE Group LoadGroup(const LinearWeights&, int64_t, int64_t) { return {}; }
  struct Block {
    VU raw;
  };
  static HWY_INLINE Block Open(const std::byte* data, int64_t i, int64_t tile_stride,
                               int64_t unit) {
    return {LoadWords(data + i / kInputs * kBlockBytes, tile_stride, unit)};
  }
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
  static HWY_INLINE Block Open(const std::byte* data, int64_t i, int64_t tile_stride,
                               int64_t unit) {
    return {LoadWords(data + i / kInputs * kBlockBytes, tile_stride, unit)};
  }
  template <int kInput>
  static HWY_INLINE VF Weight(const Block& b, const Group&) {
    const VU bits =
        kInput == 0 ? hn::ShiftLeft<16>(b.raw) : hn::And(b.raw, hn::Set(DU(), 0xFFFF0000u));
    return hn::BitCast(DF(), bits);
  }
};

// What makes a weight of a code: (code - zero) * scale, or code * scale + offset, product and sum
// each rounded. Products are exact where their factors have at most 24 bits together; then the sum
// is one fused multiply-add.
enum class Offsets : uint8_t { kNone, kFused, kApart };

inline bool ExactProducts(const model::WeightFormat& format) {
  constexpr int kHalf = 11;   // bits of a float16 number
  constexpr int kFactor = 7;  // of an int8 one's magnitude: 128 is a power of two
  return format.scale == DType::kF16 || (format.stepped() && kHalf + kFactor + format.bits <= 24);
}

// What makes weights of the codes of a group, which lie at multiples of kDistance bits, at kPlaces.
template <int kPlaces, int kDistance, Offsets kOffsets>
struct CodeGroup {
  VF scale;
  VF minus[kPlaces];  // the zero, for CodeMinusZero
  VF offset;

  static HWY_INLINE CodeGroup Load(const LinearWeights& w, int64_t unit, int64_t group) {
    CodeGroup g;
    g.scale = LoadScales(w, unit, group);
    if constexpr (kOffsets == Offsets::kNone) {
      const VF zero = LoadZeros(w, unit, group);
      Unrolled<kPlaces>([&](auto i) FRAMEQUILT_INLINE {
        g.minus[i] = hn::Add(zero, hn::Set(DF(), CodeBase(i * kDistance)));
      });
    } else {
      g.offset = LoadOffsets(w, unit, group);
    }
    return g;
  }
  template <int kBits, int kShift>
  HWY_INLINE VF Weight(VU word) const {
    if constexpr (kOffsets == Offsets::kNone)
      return hn::Mul(CodeMinusZero<kBits, kShift>(word, minus[kShift / kDistance]), scale);
    const VF code = CodeMinusZero<kBits, kShift>(word, hn::Set(DF(), CodeBase(kShift)));
    return kOffsets == Offsets::kFused ? hn::MulAdd(code, scale, offset)
                                       : hn::Add(hn::Mul(code, scale), offset);
  }
};

// 8 and 4 bits: one plane, whose bits become floats where they lie.
template <int kBits, Offsets kOffsets>
struct AffineFormat {
  static constexpr int kInputs = 32 / kBits;
  static constexpr int64_t kBytesPer32 = SuperblockBytes(kBits);
  static constexpr bool kGroups = true;
  using Group = CodeGroup<16 / kBits, kBits, kOffsets>;
  static HWY_INLINE Group LoadGroup(const LinearWeights& w, int64_t unit, int64_t group) {
    return Group::Load(w, unit, group);
  }
  struct Block {
    VU halves[2];  // codes at bits 0..15
  };
  static HWY_INLINE Block Open(const std::byte* data, int64_t i, int64_t tile_stride,
                               int64_t unit) {
    const VU raw = LoadWords(data + i / kInputs * kBlockBytes, tile_stride, unit);
    return {{raw, hn::ShiftRight<16>(raw)}};
  }
  // 8 bits: input i is byte i. 4 bits: input i is the low nibble of byte i, input 4 + i the high
  // one.
  template <int kInput>
  static HWY_INLINE VF Weight(const Block& b, const Group& g) {
    constexpr int kBit = kInput % 4 * 8 + kInput / 4 * 4;
    return g.template Weight<kBits, kBit % 16>(b.halves[kBit / 16]);
  }
};

// Widths of two planes, and of 2 bits: codes are put together as bytes first.
template <int kBits, Offsets kOffsets>
struct PlanesFormat {
  static constexpr int kInputs = kHalfInputs;
  static constexpr int64_t kBytesPer32 = SuperblockBytes(kBits);
  static constexpr bool kGroups = true;
  using Group = CodeGroup<2, 8, kOffsets>;
  static HWY_INLINE Group LoadGroup(const LinearWeights& w, int64_t unit, int64_t group) {
    return Group::Load(w, unit, group);
  }
  struct Block {
    VU words[kHalfWords];
  };
  static HWY_INLINE Block Open(const std::byte* data, int64_t i, int64_t tile_stride,
                               int64_t unit) {
    Block block;
    LoadCodes<kBits>(data + i / 32 * kBytesPer32, static_cast<int>(i / kHalfInputs % 2),
                     tile_stride, unit, block.words);
    return block;
  }
  template <int kInput>
  static HWY_INLINE VF Weight(const Block& b, const Group& g) {
    const VU word = b.words[kInput / 4];
    return g.template Weight<8, kInput % 2 * 8>(kInput / 2 % 2 == 0 ? word
                                                                    : hn::ShiftRight<16>(word));
  }
};

// Bytes of a tile for 32 inputs.
template <class Format>
constexpr int64_t BytesPer32() {
  if constexpr (Format::kGroups) {
    return Format::kBytesPer32;
  } else {
    return 32 / Format::kInputs * kBlockBytes;
  }
}

template <class Format>
int64_t TileStride(const LinearWeights& w) {
  if constexpr (Format::kGroups) {
    return w.padded_in() / 32 * Format::kBytesPer32;
  } else {
    return (w.in + Format::kInputs - 1) / Format::kInputs * kBlockBytes;
  }
}

template <class Format>
int64_t GroupSize(const LinearWeights& w) {
  return Format::kGroups ? w.group : w.in;
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
  // Inputs between two times that memory is asked ahead: for codes. Hardware prefetchers follow the
  // longer tiles of floats as well, and asking too cost 15 % where memory was the limit (Zen 5).
  constexpr int64_t kStep = Format::kGroups ? 16 : kInputs,
                    kStepBytes = BytesPer32<Format>() * kStep / 32;
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
    const auto add_block = [&](int64_t i) FRAMEQUILT_INLINE {
      typename Format::Block blocks[kUnits];
      Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
        blocks[u] = Format::Open(data, i, tile_stride, unit_of(u));
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
    };
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) {
      if constexpr (Format::kGroups) {
        Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
          PrefetchUnit<kUnits, kStepBytes>(
              UnitWords(data, tile_stride, unit_of(u)), tile_stride,
              static_cast<int64_t>(static_cast<uint64_t>(i) / kStep) * kStepBytes);
        });
      }
      Unrolled<kStep / kInputs>([&](auto b) FRAMEQUILT_INLINE { add_block(i + b * kInputs); });
    }
    for (; i + kInputs <= end; i += kInputs) add_block(i);
    if (i < end) {  // the last, partial block: x ends with `in`
      HWY_ALIGN float weights[kInputs * kUnits * kLanes];
      Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
        const auto partial = Format::Open(data, i, tile_stride, unit_of(u));
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
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    FinishUnits<kUnits>(args, r, unit, count, acc + r * kUnits);
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
  using BlockFn = void (*)(const ops::LinearArgs&, int64_t, int64_t);
  constexpr BlockFn kBlocks[] = {&StreamBlock<Format, 1>, &StreamBlock<Format, 2>,
                                 &StreamBlock<Format, 3>, &StreamBlock<Format, 4>};
  const bool eight = kManyRegisters && args.rows == kStreamRows;
  const int64_t first = eight || args.rows <= 4 ? args.rows : (args.rows + 1) / 2;
  const BlockFn all_eight = &StreamBlock < Format, kManyRegisters ? 8 : 4 > ;
  const BlockFn run_first = eight ? all_eight : kBlocks[first - 1];
  StreamSteps(args, pool, kStreamStep,
              [&](const ops::LinearArgs& one, int64_t unit, int64_t count) {
                run_first(one, unit, count);
                if (first == one.rows) return;
                ops::LinearArgs rest = one;
                rest.x += first * one.x_stride;
                rest.y += first * one.y_stride;
                rest.rows -= first;
                kBlocks[rest.rows - 1](rest, unit, count);
              });
}

// --- Many rows: panels in cache --------------------------------------------------------------

constexpr int64_t kPanelColumns = 2 * kLanes;
constexpr int64_t kGroupColumns = 64;                      // columns of one item of work
constexpr int64_t kMostInputs = kLanes == 16 ? 576 : 256;  // of a panel
constexpr int64_t kRowBlock = 384;                         // rows of one item of work

// Inputs of a panel for so many rows. 192 of 16 lanes fit the first cache level: unpacked there,
// they are read a few times. With many rows longer panels take 2 to 4 % less time (Zen 5): they are
// read from one end to the other, so that they come from the second level in time, and a third of
// the loads and stores of sums are left.
inline int64_t PanelInputs(int64_t rows) {
  constexpr int64_t kFewRows = 48;
  return kLanes == 16 && rows < kFewRows ? 192 : kMostInputs;
}

// Weights [begin, end) x unit as float32 into panel[(i - begin) * stride]. `begin` is a multiple of
// kInputs.
template <class Format>
HWY_NOINLINE void DequantizeUnit(const LinearWeights& w, int64_t unit, int64_t begin, int64_t end,
                                 float* panel, int64_t stride) {
  const DF df;
  constexpr int kInputs = Format::kInputs;
  const int64_t tile_stride = TileStride<Format>(w);
  const int64_t group_size = GroupSize<Format>(w);
  const auto* const data = static_cast<const std::byte*>(w.data);
  for (int64_t i = begin; i < end;) {
    const int64_t group_index = i / group_size;
    const int64_t group_end = std::min(end, (group_index + 1) * group_size);
    const typename Format::Group group = Format::LoadGroup(w, unit, group_index);
    for (; i < group_end; i += kInputs) {  // may write past `end` within the last block
      const typename Format::Block opened = Format::Open(data, i, tile_stride, unit);
      Unrolled<kInputs>([&](auto input) FRAMEQUILT_INLINE {
        hn::Store(Format::template Weight<input>(opened, group), df, panel);
        panel += stride;
      });
    }
  }
}

// What panels need to know of a format.
struct PanelFormat {
  void (*dequantize)(const LinearWeights& w, int64_t unit, int64_t begin, int64_t end, float* panel,
                     int64_t stride);
  int64_t tile_stride, bytes_per_32;
};
template <class Format>
PanelFormat PanelFormatOf(const LinearWeights& w) {
  return {&DequantizeUnit<Format>, TileStride<Format>(w), BytesPer32<Format>()};
}

// Any number of rows, through panels. Defined in linear.cc: compiled once.
void RunPanels(const ops::LinearArgs& args, ThreadPool& pool, const PanelFormat& format);

// Inputs that are to be rounded to bfloat16 are, and `run` multiplies them as float32 numbers.
// Scratch belongs to the engine thread and is kept.
inline void RunRounded(const ops::LinearArgs& args, ThreadPool& pool, LinearFn run) {
  static thread_local AlignedBuffer<float> own;  // the pool's threads write to it
  const int64_t in = args.w->in;
  own.reserve(static_cast<size_t>(args.rows * in));
  float* const rows = own.data();
  pool.parallel_for(args.rows, [&](int64_t r, int) {
    quant::round_row(args.x + r * args.x_stride, in, rows + r * in);
  });
  for (const ops::LinearArgs* next = &args; next != nullptr; next = next->next) {
    ops::LinearArgs one = *next;
    one.x = rows;
    one.x_stride = in;
    one.activations = {};
    one.next = nullptr;
    run(one, pool);
  }
}

template <class Format>
void RunLinear(const ops::LinearArgs& args, ThreadPool& pool) {
  if (args.rows == 0) return;
  if (args.activations.bf16) return RunRounded(args, pool, &RunLinear<Format>);
  if (args.rows <= kStreamRows) return Stream<Format>(args, pool);
  RunPanels(args, pool, PanelFormatOf<Format>(*args.w));
}

// Through panels only: for what is rarely met.
template <class Format>
void RunUnpacked(const ops::LinearArgs& args, ThreadPool& pool) {
  if (args.rows == 0) return;
  if (args.activations.bf16) return RunRounded(args, pool, &RunUnpacked<Format>);
  RunPanels(args, pool, PanelFormatOf<Format>(*args.w));
}

// Weights with codes.
template <template <int, Offsets> class Format, int kBits>
void RunCodes(const ops::LinearArgs& args, ThreadPool& pool) {
  if (args.w->offsets == nullptr) return RunLinear<Format<kBits, Offsets::kNone>>(args, pool);
  if (ExactProducts(args.w->format)) return RunLinear<Format<kBits, Offsets::kFused>>(args, pool);
  RunUnpacked<Format<kBits, Offsets::kApart>>(args, pool);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
