// Sums of weights from packed codes. Owns nothing; any thread.
#include "src/quant/row_sums.h"

#include <algorithm>
#include <cstring>

namespace fq::quant {
namespace {

constexpr int kHalf = kInputPadding / 2;  // no group is narrower than half a superblock

// Adds a plane's part of the codes of half a superblock to the sums of 8 rows; `plane` is its first
// block there. A word is 4 inputs of a row, in bytes: those are added in pairs of 16 bits, which 4
// words do not fill.
template <unsigned kBits>
void add_plane(const uint8_t* plane, unsigned half, int shift, uint32_t* sums) {
  constexpr unsigned kWords = kHalf / 4, kWordsOfBlock = 8 / kBits;
  constexpr uint32_t kMask = 0x01010101u * ((1u << kBits) - 1);
  uint32_t pairs[kTileRows] = {};
  for (unsigned word = half * kWords; word < (half + 1) * kWords; ++word) {
    uint32_t words[kTileRows];
    std::memcpy(words, plane + word / kWordsOfBlock * sizeof words, sizeof words);
    for (int r = 0; r < kTileRows; ++r) {
      const uint32_t codes = words[r] >> (word % kWordsOfBlock * kBits) & kMask;
      pairs[r] += (codes & 0x00ff00ffu) + (codes >> 8 & 0x00ff00ffu);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    sums[r] += ((pairs[r] & 0xffff) + (pairs[r] >> 16)) << shift;
  }
}

void add_half(const Planes& planes, const uint8_t* superblock, unsigned half, uint32_t* sums) {
  for (int p = 0; p < planes.count; ++p) {
    const Plane& plane = planes.plane[p];
    switch (plane.bits) {
      case 1:
        add_plane<1>(superblock, half, plane.shift, sums);
        break;
      case 2:
        add_plane<2>(superblock, half, plane.shift, sums);
        break;
      case 4:
        add_plane<4>(superblock, half, plane.shift, sums);
        break;
      default:
        add_plane<8>(superblock, half, plane.shift, sums);
    }
    superblock += plane.blocks * kTileRows * 4;
  }
}

}  // namespace

void row_sums_of_tile(const LinearWeights& w, int tile, float* out) {
  const int bits = w.format.bits;
  const auto* const codes = static_cast<const uint8_t*>(w.data) +
                            int64_t{tile} * (w.padded_in() / kInputPadding) * bits * kTileRows * 4;
  const Planes planes = planes_of(bits);
  double sums[kTileRows] = {};
  for (int group = 0; group < w.groups; ++group) {
    const int begin = group * w.group, end = std::min(w.in, begin + w.group);
    uint32_t of_codes[kTileRows] = {};  // room for 2^24 inputs
    int input = begin;
    for (; input + kHalf <= end; input += kHalf) {
      const int64_t superblock = input / kInputPadding;
      const unsigned half = input % kInputPadding != 0;
      add_half(planes, codes + superblock * bits * kTileRows * 4, half, of_codes);
    }
    for (; input < end; ++input) {  // the end of a row: padding is not read
      for (int r = 0; r < kTileRows; ++r) {
        of_codes[r] += static_cast<uint32_t>(weight_code_at(w, tile * kTileRows + r, input));
      }
    }
    const int64_t inputs = end - begin;
    for (int r = 0; r < kTileRows; ++r) {
      const int row = tile * kTileRows + r;
      const int64_t zeros = w.offsets != nullptr ? 0 : inputs * weight_zero(w, row, group);
      double sum =
          double{group_scale(w, row, group)} * static_cast<double>(int64_t{of_codes[r]} - zeros);
      if (w.offsets != nullptr) {
        sum += double{group_offset(w, row, group)} * static_cast<double>(inputs);
      }
      sums[r] += sum;
    }
  }
  for (int r = 0; r < kTileRows; ++r) out[r] = static_cast<float>(sums[r]);
}

}  // namespace fq::quant
