// Reading the tiles of packed weights (engine/CONTRACT.md, 1.3), shared by the float32 and the
// integer linears. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_TILES_INL_H_
#undef FRAMEQUILT_CPU_TILES_INL_H_
#else
#define FRAMEQUILT_CPU_TILES_INL_H_
#endif

#include <algorithm>
#include <type_traits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "src/backend/cpu/math-inl.h"
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

// Where the words of a unit begin.
HWY_INLINE const std::byte* UnitWords(const std::byte* tiles, int64_t tile_stride, int64_t unit) {
  if constexpr (kLanes == 16) return tiles + 2 * unit * tile_stride;
  constexpr int64_t kUnits = std::max<int64_t>(1, kTileRows / kLanes);
  return tiles + unit / kUnits * tile_stride + unit % kUnits * kLanes * 4;
}

// Loads one 4-byte word per lane from an array [tiles, ..., 8] of words.
HWY_INLINE VU LoadWords(const std::byte* tiles, int64_t tile_stride, int64_t unit) {
  const DU du;
  const std::byte* const at = UnitWords(tiles, tile_stride, unit);
  if constexpr (kLanes == 16) {
    const hn::Half<DU> dh;
    return hn::Combine(du, hn::LoadU(dh, reinterpret_cast<const uint32_t*>(at + tile_stride)),
                       hn::LoadU(dh, reinterpret_cast<const uint32_t*>(at)));
  } else {
    return hn::LoadU(du, reinterpret_cast<const uint32_t*>(at));
  }
}

constexpr int64_t kTilesPerUnit = kLanes == 16 ? 2 : 1;

// Bytes that a core of such vectors waits for at a time, and asks memory for ahead: on a Zen 5,
// which reads 40 GB/s, 6 KiB, where 2 KiB cost up to a third of the rate of 2 to 8 rows; with 8
// lanes four times as much was up to 15 % slower.
constexpr int64_t kBytesAhead = kLanes == 16 ? 6144 : 2048;

// Asks for kBytes of what lies kBytesAhead further on in the tiles of a unit, which begin at
// `words`, than what is read `at` now, counting all tiles of the kUnits that are read side by side.
// Each is too short for a hardware prefetcher to follow. Behind a tile's end comes the beginning of
// the one that is read at its place next. Harmless past the end of the tensor.
template <int kUnits, int64_t kBytes>
HWY_INLINE void PrefetchUnit(const std::byte* words, int64_t tile_stride, int64_t at) {
  constexpr int64_t kLine = 64, kSkipped = std::max(1, kUnits * kLanes / kTileRows) - 1;
  at += kBytesAhead / (kUnits * kTilesPerUnit);
  if (at >= tile_stride) at += kSkipped * tile_stride;
  for (int64_t line = 0; line < kBytes; line += kLine) {
    for (int64_t tile = 0; tile < kTilesPerUnit; ++tile)
      hwy::Prefetch(words + tile * tile_stride + at + line);
  }
}

using DTile = hn::CappedTag<float, kTileRows>;

// Numbers of any of the types of tables as float32: float, float16_t, int8_t, uint8_t.
template <class T, class D>
HWY_INLINE hn::Vec<D> ToFloats(D d, hn::Vec<hn::Rebind<T, D>> numbers) {
  if constexpr (std::is_same_v<T, float>) {
    return numbers;
  } else if constexpr (std::is_same_v<T, hwy::float16_t>) {
    return hn::PromoteTo(d, numbers);
  } else {
    return hn::ConvertTo(d, hn::PromoteTo(hn::Rebind<int32_t, D>(), numbers));
  }
}
template <class T, class D>
HWY_INLINE hn::Vec<D> LoadFloats(D d, const T* at) {
  return ToFloats<T>(d, hn::LoadU(hn::Rebind<T, D>(), at));
}

// Entry `at` of the rows of a unit, in a table [tiles, count, 8].
template <class T>
HWY_INLINE VF LoadEntries(const void* table, int64_t count, int64_t unit, int64_t at) {
  const T* const entries = static_cast<const T*>(table) + at * kTileRows;
  const int64_t stride = count * kTileRows;
  if constexpr (kLanes == 16) {
    const hn::Rebind<T, DTile> half;
    const T* const low = entries + 2 * unit * stride;
    return ToFloats<T>(DF(), hn::Combine(hn::Rebind<T, DF>(), hn::LoadU(half, low + stride),
                                         hn::LoadU(half, low)));
  } else {
    constexpr int64_t kUnits = kTileRows / kLanes;
    return LoadFloats(DTile(), entries + unit / kUnits * stride + unit % kUnits * kLanes);
  }
}

// The numbers of a group, in a table of the scales' type.
HWY_INLINE VF LoadNumbers(const LinearWeights& w, const void* table, const void* steps,
                          int64_t unit, int64_t group) {
  if (w.format.scale == DType::kF32) return LoadEntries<float>(table, w.groups, unit, group);
  if (w.format.scale == DType::kF16)
    return LoadEntries<hwy::float16_t>(table, w.groups, unit, group);
  return hn::Mul(LoadEntries<int8_t>(table, w.groups, unit, group),
                 LoadEntries<hwy::float16_t>(steps, w.steps, unit, group >> w.step_shift));
}
HWY_INLINE VF LoadScales(const LinearWeights& w, int64_t unit, int64_t group) {
  return LoadNumbers(w, w.scales, w.scale_steps, unit, group);
}
HWY_INLINE VF LoadOffsets(const LinearWeights& w, int64_t unit, int64_t group) {
  return LoadNumbers(w, w.offsets, w.offset_steps, unit, group);
}
HWY_INLINE VF LoadZeros(const LinearWeights& w, int64_t unit, int64_t group) {
  if (w.zeros == nullptr) return hn::Set(DF(), static_cast<float>(1 << (w.format.bits - 1)));
  return LoadEntries<uint8_t>(w.zeros, w.groups, unit, group);
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

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
