// Number formats of the KV cache and the layout of a page. A page holds kPageTokens tokens of ONE
// layer. Layout (engine/CONTRACT.md, "KV pages"): for each kv head, contiguous, 64-byte aligned:
//   K, transposed   [head_dim][64] elements
//                   kv4: [head_dim/2][64] bytes, dim 2i in the low nibble, 2i+1 in the high
//   V, token-major  [64][head_dim] elements
//                   kv4: [64][head_dim/2] bytes, dim i in the low nibble, i+head_dim/2 in the high
//   kv8 and kv4     K scale [groups][64], K zero [groups][64],
//                   V scale [64][groups], V zero [64][groups], all float32
// kv32 stores float32, kv16 IEEE half (saturating). kv8 and kv4 are asymmetric, per token and kv
// head, groups along head_dim (specs/quantization section 1.5), range extended to include zero.
// Pure functions and values; pages belong to the caller. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "framequilt/status.h"

namespace fq::quant {

inline constexpr int kPageTokens = 64;

struct KvFormat {
  int bits = 16;             // 32, 16, 8, 4
  int group = 0;             // requested group for 8 and 4 bits; 0: min(128, head_dim)
  std::string name() const;  // "kv8"
};

// "kv32", "kv16", "kv8", "kv4". Errors: invalid_argument listing what there is.
Result<KvFormat> parse_kv_format(std::string_view text);

// Byte offsets inside one head's part of a page.
struct KvPageLayout {
  KvFormat format;
  int kv_heads = 0, head_dim = 0, groups = 1, group = 0;
  size_t k_offset = 0, v_offset = 0;
  size_t k_scale_offset = 0, k_zero_offset = 0, v_scale_offset = 0, v_zero_offset = 0;
  size_t head_bytes = 0;  // stride between heads
  size_t page_bytes = 0;

  // Errors: unsupported when head_dim is odd (kv4) or otherwise not expressible.
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

// Scalar reference of appending one token: writes k[kv_heads, head_dim], v[kv_heads, head_dim] at
// `slot` of a page.
void kv_write_reference(const KvPageLayout& layout, std::byte* page, int slot, const float* k,
                        const float* v);
// Scalar reference of reading one token of one head back as float32.
void kv_read_reference(const KvPageLayout& layout, const std::byte* page, int slot, int head,
                       float* k, float* v);

}  // namespace fq::quant
