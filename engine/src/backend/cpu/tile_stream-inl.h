// One row times whole tiles: all weights are one stream of consecutive lines, for vectors that hold
// two blocks. Included once per SIMD target and extension.
#if defined(FRAMEQUILT_CPU_TILE_STREAM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_TILE_STREAM_INL_H_
#undef FRAMEQUILT_CPU_TILE_STREAM_INL_H_
#else
#define FRAMEQUILT_CPU_TILE_STREAM_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "hwy/highway.h"
#include "src/backend/cpu/integer_inputs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {

#undef FRAMEQUILT_TILE_STREAM
#if FRAMEQUILT_HAVE_DOT && FRAMEQUILT_DIRECT_DOT && HWY_TARGET == HWY_AVX3_DL
#define FRAMEQUILT_TILE_STREAM 1

// --- Codes -----------------------------------------------------------------------------------

// Half a superblock of a tile: two vectors of codes as bytes, whose upper 8 lanes hold other inputs
// of the 8 rows than the lower ones.
template <int kBits>
struct HalfTile {
  static constexpr int64_t kBytes = SuperblockBytes(kBits);
  // Words of 4 inputs that lower and upper lanes hold: of 8 bits 0 and 1, then 2 and 3; else 0 and
  // 2, then 1 and 3.
  static constexpr uint32_t kUpper = kBits == 8 ? 1 : 2;
  static constexpr uint32_t kSecond = 3 - kUpper;

  template <int kHalf>
  static HWY_INLINE void Load(const std::byte* superblock, VU (&codes)[2]) {
    constexpr int64_t kFirst = (kBits >= 4 ? 4 : 2) * 16;  // bytes of a half in the first plane
    const std::byte* const second = superblock + 2 * kFirst;
    if constexpr (kBits == 8) {
      codes[0] = Whole(superblock + kHalf * 128);
      codes[1] = Whole(superblock + kHalf * 128 + 64);
    } else if constexpr (kBits >= 4) {
      codes[0] = Whole(superblock + kHalf * kFirst);
      codes[1] = MovedBits<4, 4, 0>(codes[0]);
      codes[0] = MovedBits<4, 0, 0>(codes[0]);
    } else {
      const VU both = Twice(superblock + kHalf * kFirst);
      codes[0] = Turned<2>(both, 0, 4, 0);
      codes[1] = Turned<2>(both, 2, 6, 0);
    }
    if constexpr (kBits == 6) {
      const VU both = Twice(second + kHalf * 32);
      codes[0] = hn::Or(codes[0], Turned<2>(both, 0, 4, 4));
      codes[1] = hn::Or(codes[1], Turned<2>(both, 2, 6, 4));
    } else if constexpr (kBits == 5 || kBits == 3) {
      const VU both = Twice(second);
      constexpr int kBit = 4 * kHalf;
      codes[0] = hn::Or(codes[0], Turned<1>(both, kBit, kBit + 2, kBits - 1));
      codes[1] = hn::Or(codes[1], Turned<1>(both, kBit + 1, kBit + 3, kBits - 1));
    }
  }

  // Asks for half of the lines of the superblock kBytesAhead further on; behind the tile's end
  // comes the next one.
  template <int kHalf>
  static HWY_INLINE void Prefetch(const std::byte* superblock) {
    constexpr int64_t kLines = (kBytes + 63) / 64, kHere = (kLines + 1 - kHalf) / 2;
    for (int64_t line = 0; line < kHere; ++line)
      hwy::Prefetch(superblock + kBytesAhead + (kHalf * ((kLines + 1) / 2) + line) * 64);
  }

 private:
  // Masks of all lanes: without one, GCC 12 warns of the undefined vector in its own header.
  static constexpr __mmask16 kAll = 0xFFFF;
  static HWY_INLINE VU Whole(const std::byte* at) {
    return hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(at));
  }
  static HWY_INLINE VU Twice(const std::byte* block) {
    return VU{_mm512_maskz_broadcast_i64x4(
        kAll & 0xFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block)))};
  }
  // kPart bits of every byte, from bit `lower` in lower lanes and from `upper` in upper ones, moved
  // to bit `to`.
  template <int kPart>
  static HWY_INLINE VU Turned(VU words, int lower, int upper, int to) {
    const VU by = hn::Combine(DU(), hn::Set(hn::Half<DU>(), static_cast<uint32_t>(upper - to)),
                              hn::Set(hn::Half<DU>(), static_cast<uint32_t>(lower - to)));
    const uint32_t mask = (((1u << kPart) - 1) << to) * 0x01010101u;
    return hn::And(VU{_mm512_maskz_rorv_epi32(kAll, words.raw, by.raw)}, hn::Set(DU(), mask));
  }
};

// --- Parameters ------------------------------------------------------------------------------

// Of one group of a tile, or of two that follow each other, by the lanes of D.
template <class D>
HWY_INLINE hn::Vec<D> TileNumbers(D d, const LinearWeights& w, const void* table, const void* steps,
                                  int64_t tile, int64_t group) {
  const int64_t at = (tile * w.groups + group) * kTileRows;
  if (w.format.scale == DType::kF32) return LoadFloats(d, static_cast<const float*>(table) + at);
  if (w.format.scale == DType::kF16)
    return LoadFloats(d, static_cast<const hwy::float16_t*>(table) + at);
  const int64_t step = (tile * w.steps + (group >> w.step_shift)) * kTileRows;
  const auto of_step = LoadFloats(DTile(), static_cast<const hwy::float16_t*>(steps) + step);
  const auto factors = LoadFloats(d, static_cast<const int8_t*>(table) + at);
  if constexpr (hn::MaxLanes(D()) == kTileRows) {
    return hn::Mul(factors, of_step);
  } else {  // steps have an even number of groups
    return hn::Mul(factors, hn::Combine(d, of_step, of_step));
  }
}

template <class D>
struct TileGroup {
  hn::Vec<D> scale, shift;
};
template <class D>
HWY_INLINE TileGroup<D> LoadTileGroup(D d, const LinearWeights& w, int64_t tile, int64_t group) {
  TileGroup<D> g;
  g.scale = TileNumbers(d, w, w.scales, w.scale_steps, tile, group);
  if (w.offsets != nullptr) {
    g.shift = TileNumbers(d, w, w.offsets, w.offset_steps, tile, group);
    return g;
  }
  const int64_t at = (tile * w.groups + group) * kTileRows;
  const auto zero = w.zeros != nullptr ? LoadFloats(d, w.zeros + at)
                                       : hn::Set(d, static_cast<float>(1 << (w.format.bits - 1)));
  g.shift = hn::Mul(hn::Neg(zero), g.scale);
  return g;
}

// --- Sums --------------------------------------------------------------------------------------

// A row of inputs on its way through the tile.
template <int kBits>
class TileWalk {
 public:
  TileWalk(const LinearWeights& w, const Inputs& inputs, int64_t tile)
      : at_(static_cast<const std::byte*>(w.data) + tile * (w.padded_in() / 32) * Half::kBytes),
        x_(inputs.codes) {
    const DU du;
    const VU lanes = hn::Mul(hn::ShiftRight<3>(hn::Iota(du, 0)), hn::Set(du, Half::kUpper));
    first_ = hn::IndicesFromVec(du, lanes);
    second_ = hn::IndicesFromVec(du, hn::Add(lanes, hn::Set(du, Half::kSecond)));
  }
  // Adds the products of half kHalf of the superblock: 8 rows in the lower lanes, the same in the
  // upper ones.
  template <int kHalf>
  HWY_INLINE void AddHalf(VI* sums) {
    const VU words{_mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x_)))};
    VU codes[2];
    Half::template Load<kHalf>(at_, codes);
    Half::template Prefetch<kHalf>(at_);
    sums[0] = DirectDot(sums[0], codes[0], hn::TableLookupLanes(words, first_));
    sums[1] = DirectDot(sums[1], codes[1], hn::TableLookupLanes(words, second_));
    x_ += kHalfInputs;
    if constexpr (kHalf == 1) at_ += Half::kBytes;
  }

 private:
  using Half = HalfTile<kBits>;
  using Indices = decltype(hn::IndicesFromVec(DU(), VU()));
  const std::byte* at_;
  const int8_t* x_;
  Indices first_, second_;
};

using TileSumsFn = hn::Vec<DTile> (*)(const LinearWeights& w, const Inputs& inputs, int64_t tile);

// The sums of a row of inputs with the 8 rows of a tile. Out of line: with two copies of this loop,
// for even and odd tiles, tiles of 896 inputs came from memory at four fifths of the rate (Zen 5),
// presumably because a hardware prefetcher tells streams apart by the instruction that reads them,
// and each copy saw its stream jump after every tile.
template <int kBits>
HWY_NOINLINE hn::Vec<DTile> TileSums(const LinearWeights& w, const Inputs& inputs, int64_t tile) {
  const DTile df;
  const hn::Rebind<int32_t, DTile> di;
  const int64_t padded = w.padded_in();
  TileWalk<kBits> walk(w, inputs, tile);
  auto sum = hn::Zero(df);
  int64_t span = 0, group = 0, group_end = w.group;
  for (int64_t begin = 0; begin < w.in; begin += inputs.span, ++span) {
    if (begin == group_end) {
      ++group;
      group_end += w.group;
    }
    const int64_t end = std::min(begin + inputs.span, padded);
    VI sums[4];
    Unrolled<4>([&](auto i) FRAMEQUILT_INLINE { sums[i] = hn::Zero(DI()); });
    for (int64_t i = begin; i < end; i += 2 * kHalfInputs) {  // whole superblocks: see TileSumsFor
      walk.template AddHalf<0>(sums);
      walk.template AddHalf<1>(sums + 2);
    }
    const VI both = hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3]));
    const auto products = hn::Add(hn::LowerHalf(di, both), hn::UpperHalf(di, both));
    const TileGroup<DTile> g = LoadTileGroup(df, w, tile, group);
    sum = hn::MulAdd(g.scale, hn::ConvertTo(df, products), sum);
    sum = hn::MulAdd(g.shift, hn::Set(df, inputs.sums[span]), sum);
  }
  return sum;
}

// The same for small groups, of kHalves halves of a superblock, two at a time: what a group costs
// beside its products would take as long as they do. A group is added after the other all the same.
template <int kBits, int kHalves>
HWY_NOINLINE hn::Vec<DTile> TileSumsOfSmall(const LinearWeights& w, const Inputs& inputs,
                                            int64_t tile) {
  const DTile df;
  const DF all;
  const hn::Rebind<int32_t, DTile> di;
  TileWalk<kBits> walk(w, inputs, tile);
  auto sum = hn::Zero(df);
  const auto add = [&](auto scale, auto products, auto shift, int64_t group) FRAMEQUILT_INLINE {
    sum = hn::MulAdd(scale, products, sum);
    sum = hn::MulAdd(shift, hn::Set(df, inputs.sums[group]), sum);
  };
  // Products of `halves` halves of superblocks, the first of them half `from`.
  const auto products_of = [&](auto from, auto halves) FRAMEQUILT_INLINE {
    VI sums[2 * halves];
    Unrolled<2 * halves>([&](auto i) FRAMEQUILT_INLINE { sums[i] = hn::Zero(DI()); });
    Unrolled<halves>(
        [&](auto h) FRAMEQUILT_INLINE { walk.template AddHalf<(from + h) % 2>(sums + 2 * h); });
    const VI products = hn::Add(sums[0], sums[1]);
    if constexpr (halves == 1) return products;
    return hn::Add(products, hn::Add(sums[2 * halves - 2], sums[2 * halves - 1]));
  };
  constexpr std::integral_constant<int, 0> kEven;
  constexpr std::integral_constant<int, kHalves % 2> kOdd;
  constexpr std::integral_constant<int, kHalves> kAll;
  int64_t group = 0;
  for (; group + 2 <= w.groups; group += 2) {
    const VI one = products_of(kEven, kAll), other = products_of(kOdd, kAll);
    const VF products = hn::ConvertTo(all, hn::Add(hn::ConcatLowerLower(DI(), other, one),
                                                   hn::ConcatUpperUpper(DI(), other, one)));
    const TileGroup<DF> g = LoadTileGroup(all, w, tile, group);
    add(hn::LowerHalf(df, g.scale), hn::LowerHalf(df, products), hn::LowerHalf(df, g.shift), group);
    add(hn::UpperHalf(df, g.scale), hn::UpperHalf(df, products), hn::UpperHalf(df, g.shift),
        group + 1);
  }
  if (group < w.groups) {
    const VI one = products_of(kEven, kAll);
    const auto products = hn::Add(hn::LowerHalf(di, one), hn::UpperHalf(di, one));
    const TileGroup<DTile> g = LoadTileGroup(df, w, tile, group);
    add(g.scale, hn::ConvertTo(df, products), g.shift, group);
  }
  return sum;
}

template <int kBits>
TileSumsFn TileSumsFor(const LinearWeights& w) {
  switch (w.group) {  // up to 512 inputs are one span
    case kHalfInputs:
      return &TileSumsOfSmall<kBits, 1>;
    case 2 * kHalfInputs:
      return &TileSumsOfSmall<kBits, 2>;
    default:
      return &TileSums<kBits>;
  }
}

#else
#define FRAMEQUILT_TILE_STREAM 0
#endif

}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
