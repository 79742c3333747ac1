// The kernels of one SIMD target, and the families that fill the table. A table is plain function
// pointers: backends of different targets live side by side.
#pragma once

#include <array>

#include "src/backend/backend.h"

namespace fq::backend::cpu {

struct Kernels {
  LinearFn linear_f32 = nullptr, linear_bf16 = nullptr;
  std::array<LinearFn, 9> linear_affine = {};   // by bits
  std::array<LinearFn, 9> linear_integer = {};  // likewise: quantized inputs
  // Inputs in bfloat16, by bits of affine weights, 16: bf16 weights. Empty: the float32 linears,
  // which round inputs first.
  std::array<LinearFn, 17> linear_bf16dot = {};
  NormFn rms_norm = nullptr, layer_norm = nullptr;
  RopeFn rope = nullptr;
  KvAppendFn kv_append = nullptr;   // reads the number format from the layout
  AttentionFn attention = nullptr;  // likewise
  ImportanceFn importance = nullptr;
  EncoderAttentionFn encoder_attention = nullptr;
  EncoderAttentionFn integer_encoder_attention = nullptr;  // 8-bit queries and keys
  std::array<ActivationFn, 4> activation = {};             // by model::Activation
  SimilarityFn similarity = nullptr;
};

// The scalar references, spread over the pool by rows.
Kernels scalar_kernels();

// Each fills its part with the functions of the target that Highway has chosen at the time of the
// call; simd_kernels() in targets.cc chooses it.
void fill_linear_kernels(Kernels& kernels);
void fill_planes_linear_kernels(Kernels& kernels);
void fill_row_kernels(Kernels& kernels);  // norms, rope, activations, similarity
void fill_kv_append_kernels(Kernels& kernels);
void fill_encoder_attention_kernels(Kernels& kernels);

// Those that are there for extensions as well, which fill their part of the table anew
// (extension.h).
inline namespace any_processor {
void fill_integer_linear_kernels(Kernels& kernels);
void fill_attention_kernels(Kernels& kernels);  // attention, importance
void fill_integer_encoder_attention_kernels(Kernels& kernels);
void fill_bf16dot_linear_kernels(Kernels& kernels);  // x86 with AVX512_BF16 only
}  // namespace any_processor

namespace neon_dot {  // 64-bit Arm only, as the next ones
void fill_integer_linear_kernels(Kernels& kernels);
void fill_integer_encoder_attention_kernels(Kernels& kernels);
}  // namespace neon_dot
namespace neon_i8mm {
void fill_integer_linear_kernels(Kernels& kernels);
void fill_integer_encoder_attention_kernels(Kernels& kernels);
}  // namespace neon_i8mm

namespace avx_vnni {  // where FRAMEQUILT_AVX2_VNNI, as the next ones
void fill_integer_linear_kernels(Kernels& kernels);
void fill_attention_kernels(Kernels& kernels);
void fill_integer_encoder_attention_kernels(Kernels& kernels);
}  // namespace avx_vnni
namespace avx512_vnni {
void fill_integer_linear_kernels(Kernels& kernels);
void fill_attention_kernels(Kernels& kernels);
void fill_integer_encoder_attention_kernels(Kernels& kernels);
}  // namespace avx512_vnni

namespace amx {  // where FRAMEQUILT_AMX
void fill_integer_linear_kernels(Kernels& kernels);
void fill_attention_kernels(Kernels& kernels);
void fill_integer_encoder_attention_kernels(Kernels& kernels);
void fill_bf16dot_linear_kernels(Kernels& kernels);
}  // namespace amx

// x86 only. The linears take the place of some that are there already.
namespace fold {
void fill_winograd_linear_kernels(Kernels& kernels);
void fill_integer_encoder_attention_kernels(Kernels& kernels);
}  // namespace fold

}  // namespace fq::backend::cpu
