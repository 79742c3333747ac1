// Sums of weights from packed codes. Owns nothing; any thread.
#include "src/quant/row_sums.h"

#include <algorithm>
#include <cstring>

namespace fq::quant {
namespace {

constexpr int kHalf = kInputPadding / 2;  // no group is narrower than half a superblock

// Adds the codes of half a superblock to the sums of 8 rows. A word is 4 inputs of a row, and a
// plane has them in bytes: those are added in pairs of 16 bits, which 4 words do not fill.
void add_half(const uint8_t* superblock, int bits, int half, int64_t* sums) {
  const Planes planes = planes_of(bits);
  for (int p = 0; p < planes.count; ++p) {
    const Plane& plane = planes.plane[p];
    const uint32_t mask = 0x01010101u * ((1u << plane.bits) - 1);
    uint32_t pairs[kTileRows] = {};
    for (int word = half * kHalf / 4; word < (half + 1) * kHalf / 4; ++word) {
      const PlaneBit at = plane_bit(plane, word * 4);
      uint32_t words[kTileRows];
      std::memcpy(words, superblock + at.block * kTileRows * 4, sizeof words);
      for (int r = 0; r < kTileRows; ++r) {
        const uint32_t codes = words[r] >> at.bit & mask;
        pairs[r] += (codes & 0x00ff00ffu) + (codes >> 8 & 0x00ff00ffu);
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      sums[r] += ((pairs[r] & 0xffff) + (pairs[r] >> 16)) << plane.shift;
    }
    superblock += plane.blocks * kTileRows * 4;
  }
}

}  // namespace

void row_sums_of_tile(const LinearWeights& w, int tile, float* out) {
  const int bits = w.format.bits;
  const auto* const codes = static_cast<const uint8_t*>(w.data) +
                            int64_t{tile} * (w.padded_in() / kInputPadding) * bits * kTileRows * 4;
  double sums[kTileRows] = {};
  for (int group = 0; group < w.groups; ++group) {
    const int begin = group * w.group, end = std::min(w.in, begin + w.group);
    int64_t of_codes[kTileRows] = {};
    int input = begin;
    for (; input + kHalf <= end; input += kHalf) {
      const int64_t superblock = input / kInputPadding;
      add_half(codes + superblock * bits * kTileRows * 4, bits, input / kHalf % 2, of_codes);
    }
    for (; input < end; ++input) {  // the end of a row: padding is not read
      for (int r = 0; r < kTileRows; ++r) {
        of_codes[r] += weight_code_at(w, tile * kTileRows + r, input);
      }
    }
    const int64_t inputs = end - begin;
    for (int r = 0; r < kTileRows; ++r) {
      const int row = tile * kTileRows + r;
      const int64_t zeros = w.offsets != nullptr ? 0 : inputs * weight_zero(w, row, group);
      double sum = double{group_scale(w, row, group)} * static_cast<double>(of_codes[r] - zeros);
      if (w.offsets != nullptr) {
        sum += double{group_offset(w, row, group)} * static_cast<double>(inputs);
      }
      sums[r] += sum;
    }
  }
  for (int r = 0; r < kTileRows; ++r) out[r] = static_cast<float>(sums[r]);
}

}  // namespace fq::quant
