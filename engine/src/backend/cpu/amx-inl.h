// The matrix registers of x86 (AMX): what the kernels use of them. A tile has up to 16 rows of 64
// bytes; a product of two of them takes 16 cycles, however few inputs they have. Included once per
// SIMD target; there is something in it for one, in the files of processors that have AMX.
#if defined(FRAMEQUILT_CPU_AMX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_AMX_INL_H_
#undef FRAMEQUILT_CPU_AMX_INL_H_
#else
#define FRAMEQUILT_CPU_AMX_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {

#undef FRAMEQUILT_HAVE_AMX
#if FRAMEQUILT_AMX && HWY_TARGET == HWY_AVX3_DL
#define FRAMEQUILT_HAVE_AMX 1

constexpr int64_t kTileSide = 16;    // rows of a tile, and words of 4 bytes of a row
constexpr int64_t kTileBytes = 64;   // of a row

// Tiles 0 to 3 are sums, 4 and 5 inputs (rows of `input_bytes`, at most 64), 6 and 7 weights (a row
// is a word of 4 bytes for each of 16 columns). The tiles of a thread are set up for as long as this
// lives: what else runs on the thread, such as another library's kernels, finds them free.
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
// sums += inputs * weights, exactly: signed inputs times unsigned weights, int32 sums.
template <int kSums, int kInputs, int kWeights>
HWY_INLINE void AddTileProducts() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kInputs), "i"(kWeights));
}

#else
#define FRAMEQUILT_HAVE_AMX 0
#endif

}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
