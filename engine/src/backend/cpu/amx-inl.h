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
#include "src/backend/cpu/gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {

#undef FRAMEQUILT_HAVE_AMX
#if FRAMEQUILT_AMX && HWY_TARGET == HWY_AVX3_DL
#define FRAMEQUILT_HAVE_AMX 1

constexpr int64_t kTileSide = 16;   // rows of a tile, and words of 4 bytes of a row
constexpr int64_t kTileBytes = 64;  // of a row

// Tiles 0 and 1 are sums, 2 and 3 inputs (rows of `input_bytes`, at most 64), 4 weights (a row is a
// word of 4 bytes for each of 16 columns). The other three stay empty: a core seems to have 16
// registers for tiles, which its two threads halve while both run. A thread that uses all eight
// has none left then to load the next tile into: on a Xeon of the fifth generation with a busy
// sibling, products of tiles just loaded take 20 cycles with three to five tiles in use, 75 to 90
// with eight, and 16 to 20 either way without.
//
// The tiles of a thread are set up for as long as this lives: what else runs on the thread, such as
// another library's kernels, finds them free.
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
    for (int tile = 0; tile <= 4; ++tile) {
      const bool inputs = tile == 2 || tile == 3, weights = tile == 4;
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
  bool inputs = true, left = false, right = false;  // signed bytes; weights left and right
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

// --- Sums of 16 rows and 32 columns --------------------------------------------------------------

constexpr int64_t kSumColumns = 2 * kTileSide;
constexpr int64_t kSumRowBytes = kSumColumns * 4;
constexpr int64_t kSums = kTileSide * kSumColumns;

struct TileOperands {
  const void* inputs = nullptr;     // 16 rows
  int64_t stride = 0;               // bytes between them
  const uint32_t* words = nullptr;  // of the weights: rows of 4 bytes of each of 32 columns
  int64_t word_stride = 0;          // words between rows
  int64_t tiles = 0;
  int64_t tile_bytes = kTileBytes;  // of a row of inputs
};

// sums [16][kSumColumns] = the products of `tiles` tiles; kTiles says how many, or is 0.
// `between()` is called after each product of two tiles. Products that add to the same sums do not
// wait for each other, so that one tile of them suffices; those of a tile of inputs that is used
// again stay.
template <TileKind kKind, int kTiles, class Between>
HWY_INLINE void MultiplyTiles(const TileOperands& in, int32_t* sums, const Between& between) {
  static_assert(kTiles <= 2);
  const int64_t word_bytes = in.word_stride * 4, words_of_tile = in.word_stride * in.tile_bytes / 4;
  const auto* inputs = static_cast<const std::byte*>(in.inputs);
  const uint32_t* words = in.words;
  if constexpr (kTiles > 0) {
    ZeroTile<0>();
    LoadTile<2>(inputs, in.stride);
    LoadTile<4>(words, word_bytes);
    AddTileProducts<0, 2, 4, kKind.bf16, kKind.inputs, kKind.left>();
    between();
    if constexpr (kTiles == 2) {
      LoadTile<3>(inputs + in.tile_bytes, in.stride);
      LoadTile<4>(words + words_of_tile, word_bytes);
      AddTileProducts<0, 3, 4, kKind.bf16, kKind.inputs, kKind.left>();
      between();
    }
    StoreTile<0>(sums, kSumRowBytes);
    ZeroTile<0>();
    words += kTileSide;
    LoadTile<4>(words, word_bytes);
    AddTileProducts<0, 2, 4, kKind.bf16, kKind.inputs, kKind.right>();
    between();
    if constexpr (kTiles == 2) {
      LoadTile<4>(words + words_of_tile, word_bytes);
      AddTileProducts<0, 3, 4, kKind.bf16, kKind.inputs, kKind.right>();
      between();
    }
    StoreTile<0>(sums + kTileSide, kSumRowBytes);
  } else {
    ZeroTile<0>();
    ZeroTile<1>();
    for (int64_t left = in.tiles; left > 0; --left) {
      LoadTile<2>(inputs, in.stride);
      LoadTile<4>(words, word_bytes);
      AddTileProducts<0, 2, 4, kKind.bf16, kKind.inputs, kKind.left>();
      between();
      LoadTile<4>(words + kTileSide, word_bytes);
      AddTileProducts<1, 2, 4, kKind.bf16, kKind.inputs, kKind.right>();
      between();
      words += words_of_tile;
      inputs += in.tile_bytes;
    }
    StoreTile<0>(sums, kSumRowBytes);
    StoreTile<1>(sums + kTileSide, kSumRowBytes);
  }
}

template <TileKind kKind>
HWY_INLINE void MultiplyTiles(const TileOperands& in, int32_t* sums) {
  const auto nothing = []() FRAMEQUILT_INLINE {};
  if (in.tiles == 1) return MultiplyTiles<kKind, 1>(in, sums, nothing);
  if (in.tiles == 2) return MultiplyTiles<kKind, 2>(in, sums, nothing);
  MultiplyTiles<kKind, 0>(in, sums, nothing);
}

// For each of `blocks` (at least one): multiply(block, sums) and finish(block, sums), where `sums`
// has room for two products. One block is finished while the next one is multiplied.
template <class Multiply, class Finish>
HWY_INLINE void ForTileBlocks(int64_t blocks, const Multiply& multiply, const Finish& finish) {
  alignas(64) int32_t sums[2][2 * kSums];
  for (int64_t block = 0; block < blocks; ++block) {
    multiply(block, sums[block % 2]);
    if (block > 0) finish(block - 1, static_cast<const int32_t*>(sums[(block - 1) % 2]));
  }
  finish(blocks - 1, static_cast<const int32_t*>(sums[(blocks - 1) % 2]));
}

// Inputs in whole tiles.
constexpr int64_t TiledInputs(int64_t inputs) {
  return (inputs + kTileBytes - 1) / kTileBytes * kTileBytes;
}

// What products read and write, and nobody uses: rows behind the last one, bytes behind those.
constexpr size_t kSpareRows = kTileSide - 1;
constexpr size_t kSpareBytes = kTileBytes;

#else
#define FRAMEQUILT_HAVE_AMX 0
constexpr size_t kSpareRows = 0, kSpareBytes = 0;
#endif

}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
