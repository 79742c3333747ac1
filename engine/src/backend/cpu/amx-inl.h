// The matrix registers of x86 (AMX): what the kernels use of them. A tile has up to 16 rows of 64
// bytes; a product of two of them takes 16 cycles, however few inputs they have. Included once per
// SIMD target; there is something in it for one, in the files of processors that have AMX.
#if defined(FRAMEQUILT_CPU_AMX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_AMX_INL_H_
#undef FRAMEQUILT_CPU_AMX_INL_H_
#else
#define FRAMEQUILT_CPU_AMX_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {

#undef FRAMEQUILT_HAVE_AMX
#if FRAMEQUILT_AMX && HWY_TARGET == HWY_AVX3_DL
#define FRAMEQUILT_HAVE_AMX 1

constexpr int64_t kTileSide = 16;            // rows of a tile, and words of 4 bytes of a row
constexpr int64_t kTileBytes = 64;           // of a row
constexpr int64_t kAmxRows = 2 * kTileSide;  // that are multiplied at once

// Tiles 0 to 3 are sums, 4 and 5 inputs (rows of `input_bytes`, at most 64), 6 and 7 weights (a row
// is a word of 4 bytes for each of 16 columns). The tiles of a thread are set up for as long as
// this lives: what else runs on the thread, such as another library's kernels, finds them free.
class Tiles {
 public:
  explicit Tiles(int64_t input_bytes = kTileBytes) {
    alignas(64) struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    static_assert(sizeof(config) == 64);
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      const bool inputs = tile == 4 || tile == 5, weights = tile >= 6;
      config.row_bytes[tile] = static_cast<uint16_t>(inputs ? input_bytes : kTileBytes);
      config.rows[tile] = static_cast<uint8_t>(weights ? input_bytes / 4 : kTileSide);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { __asm__ volatile("tilerelease"); }
};

// In assembly, as all instructions that Highway's targets do not name. The compiler uses no tiles.
// `stride`: bytes between rows.
template <int kTile>
HWY_INLINE void ZeroTile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
HWY_INLINE void LoadTile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
HWY_INLINE void StoreTile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
// What is multiplied: bytes, signed or not, whose sums are exact in int32; or bfloat16 numbers,
// whose products are summed in float32, even and odd inputs of a tile apart and then added.
struct TileKind {
  bool first = true, second = true, left = false, right = false;  // signed bytes
  bool bf16 = false;
};

// sums += inputs * weights
template <int kSums, int kInputs, int kWeights, bool kBf16, bool kSignedInputs, bool kSignedWeights>
HWY_INLINE void AddTileProducts() {
#define FRAMEQUILT_TILE_PRODUCTS(instruction)                                              \
  __asm__ volatile(instruction " %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kInputs), \
                   "i"(kWeights))
  if constexpr (kBf16) {
    FRAMEQUILT_TILE_PRODUCTS("tdpbf16ps");
  } else if constexpr (kSignedInputs && kSignedWeights) {
    FRAMEQUILT_TILE_PRODUCTS("tdpbssd");
  } else if constexpr (kSignedInputs) {
    FRAMEQUILT_TILE_PRODUCTS("tdpbsud");
  } else if constexpr (kSignedWeights) {
    FRAMEQUILT_TILE_PRODUCTS("tdpbusd");
  } else {
    FRAMEQUILT_TILE_PRODUCTS("tdpbuud");
  }
#undef FRAMEQUILT_TILE_PRODUCTS
}

// --- Four tiles of sums ------------------------------------------------------------------------
//
// One or two tiles of inputs, `first` and `second`, times two neighbouring ones of weights, left
// and right: so loading of tiles takes no longer than multiplying them. The sums of `second` lie
// behind those of `first`.

constexpr int64_t kSumColumns = 2 * kTileSide;
constexpr int64_t kSumRowBytes = kSumColumns * 4;

struct TileInputs {
  const void* first = nullptr;
  const void* second = nullptr;
  int64_t stride = 0;               // bytes between rows
  const uint32_t* words = nullptr;  // of the weights: rows of 4 bytes of each of 32 columns
  int64_t word_stride = 0;          // words between rows
  int64_t tiles = 0;
  int64_t tile_bytes = kTileBytes;  // of a row of inputs
};

// `between()` is called after each product of two tiles.
template <int kHalves, TileKind kKind, class Between>
HWY_INLINE void MultiplyTiles(const TileInputs& in, const Between& between) {
  ZeroTile<0>();
  ZeroTile<1>();
  if constexpr (kHalves == 2) {
    ZeroTile<2>();
    ZeroTile<3>();
  }
  const int64_t word_bytes = in.word_stride * 4, words_of_tile = in.word_stride * in.tile_bytes / 4;
  const auto* first = static_cast<const std::byte*>(in.first);
  const auto* second = static_cast<const std::byte*>(in.second);
  const uint32_t* words = in.words;
  for (int64_t left = in.tiles; left > 0; --left) {
    LoadTile<6>(words, word_bytes);
    LoadTile<4>(first, in.stride);
    AddTileProducts<0, 4, 6, kKind.bf16, kKind.first, kKind.left>();
    between();
    LoadTile<7>(words + kTileSide, word_bytes);
    AddTileProducts<1, 4, 7, kKind.bf16, kKind.first, kKind.right>();
    between();
    if constexpr (kHalves == 2) {
      LoadTile<5>(second, in.stride);
      AddTileProducts<2, 5, 6, kKind.bf16, kKind.second, kKind.left>();
      between();
      AddTileProducts<3, 5, 7, kKind.bf16, kKind.second, kKind.right>();
      between();
    }
    words += words_of_tile;
    first += in.tile_bytes;
    second += in.tile_bytes;
  }
}

// To [kHalves * 16][kSumColumns].
template <int kHalves>
HWY_INLINE void StoreSums(int32_t* sums) {
  StoreTile<0>(sums, kSumRowBytes);
  StoreTile<1>(sums + kTileSide, kSumRowBytes);
  if constexpr (kHalves == 2) {
    sums += kTileSide * kSumColumns;
    StoreTile<2>(sums, kSumRowBytes);
    StoreTile<3>(sums + kTileSide, kSumRowBytes);
  }
}

// For each of `blocks` (at least one): multiply(block), after which its sums are in the tiles, and
// finish(block, sums), which finds them in memory. One block is finished while the next one is
// multiplied.
template <class Multiply, class Finish>
HWY_INLINE void ForTileBlocks(int64_t blocks, const Multiply& multiply, const Finish& finish) {
  alignas(64) int32_t sums[2 * kTileSide * kSumColumns];
  for (int64_t block = 0; block < blocks; ++block) {
    multiply(block);
    if (block > 0) finish(block - 1, static_cast<const int32_t*>(sums));
    StoreSums<2>(sums);
  }
  finish(blocks - 1, static_cast<const int32_t*>(sums));
}

// Inputs in whole tiles.
constexpr int64_t TiledInputs(int64_t inputs) {
  return (inputs + kTileBytes - 1) / kTileBytes * kTileBytes;
}

// What products read and write, and nobody uses: rows behind the last one, bytes behind those.
constexpr size_t kSpareRows = kAmxRows - 1;
constexpr size_t kSpareBytes = kTileBytes;

#else
#define FRAMEQUILT_HAVE_AMX 0
constexpr size_t kSpareRows = 0, kSpareBytes = 0;
#endif

}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
