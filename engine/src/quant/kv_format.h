// The layout of a page of the KV cache, in the format that model/kv_format.h names. A page holds
// kPageTokens tokens of ONE layer; for each kv head, contiguous, 64-byte aligned
// (engine/CONTRACT.md, section 2):
//   K   a matrix [head_dim][64]: a row is one dim of all tokens
//   V   a matrix [64][head_dim]: a row is all dims of one token
//   K scale, K zero, V scale, V zero   [groups][64] each, where the part has codes
// 32 bits store float32, 16 IEEE half (saturating). 8, 6, 4, 3 and 2 bits store codes in planes
// (kv_planes): in a plane of p bits 8/p consecutive rows of the matrix share a row of bytes, row r
// at bits p * (r % (8/p)). Codes are asymmetric, per token and kv head, groups along head_dim
// (specs/quantization section 1.5), range extended to include zero; scale half (or float32), zero
// one byte. Pure functions and values; pages belong to the caller. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "framequilt/status.h"
#include "src/model/kv_format.h"

namespace fq::quant {

inline constexpr int kPageTokens = 64;

using model::KvFormat;
using model::parse_kv_format;

// The planes of a code, low bits first: 8; 4 2; 4; 2 1; 2 bits.
struct KvPlanes {
  int low, high;  // bits; high 0: one plane
};
constexpr KvPlanes kv_planes(int bits) {
  return bits == 6 ? KvPlanes{4, 2} : bits == 3 ? KvPlanes{2, 1} : KvPlanes{bits, 0};
}

// K or V of one head: byte offsets inside the head's part of a page.
struct KvPart {
  int bits = 16;
  int rows = 0, columns = 0;     // the matrix: K [head_dim, 64], V [64, head_dim]
  int group = 0, groups = 1;     // dims of a group; floats: head_dim, 1
  size_t low = 0, high = 0;      // planes of codes, or the floats (low)
  size_t scales = 0, zeros = 0;  // [groups][64], codes only
  bool has_codes() const { return bits <= 8; }
};

struct KvPageLayout {
  KvFormat format;  // of this layer
  int kv_heads = 0, head_dim = 0;
  KvPart k, v;
  size_t head_bytes = 0;  // stride between heads
  size_t page_bytes = 0;

  // `format` as it is: of_layer() is the caller's. Errors: unsupported.
  static Result<KvPageLayout> make(KvFormat format, int kv_heads, int head_dim);
};

// Asymmetric round-to-nearest of one group (specs/quantization section 1.1), float32, round half to
// even. include_zero extends the range to contain 0 (production default); false is the reference's
// range.
struct AffineParams {
  float scale;
  float zero;
};
AffineParams affine_params(const float* x, int n, int bits, bool include_zero);
uint8_t affine_code(float x, AffineParams p, int bits);

// Parameters of a group of K or V: the range includes zero, and the scale is the stored one (half,
// rounded up so that the range is covered; float32 with scale32) before zero and codes are computed
// from it. So |x - (code - zero) * scale| <= scale / 2, up to float32 rounding of the quotient.
AffineParams kv_params(const float* x, int n, int bits, bool scale32);
// The scale that a group of range max - min gets, as kv_params computes it.
float kv_scale(float range, int bits, bool scale32);

// Scalar reference of appending one token: writes k[kv_heads, head_dim], v[kv_heads, head_dim] at
// `slot` of a page. Bits of other tokens in shared bytes are kept.
void kv_write_reference(const KvPageLayout& layout, std::byte* page, int slot, const float* k,
                        const float* v);
// Scalar reference of reading one token of one head in the form attention uses: x[head_dim] are
// (code - zero), exact, and scales[groups] what they are times; floats: the value and 1.
void kv_read_factors(const KvPageLayout& layout, const KvPart& part, const std::byte* page,
                     int slot, int head, float* x, float* scales);
// The values: (code - zero) * scale, one rounding.
void kv_read_reference(const KvPageLayout& layout, const std::byte* page, int slot, int head,
                       float* k, float* v);

}  // namespace fq::quant
