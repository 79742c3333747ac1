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
void fill_integer_linear_kernels(Kernels& kernels);
void fill_neon_dot_linear_kernels(Kernels& kernels);  // 64-bit Arm only, both
void fill_neon_i8mm_linear_kernels(Kernels& kernels);
void fill_avx_vnni_linear_kernels(Kernels& kernels);  // where FRAMEQUILT_AVX2_VNNI, both
void fill_avx512_vnni_linear_kernels(Kernels& kernels);
void fill_amx_linear_kernels(Kernels& kernels);  // where FRAMEQUILT_AMX, as the next ones
void fill_amx_bf16_linear_kernels(Kernels& kernels);
void fill_amx_attention_kernels(Kernels& kernels);
void fill_amx_encoder_attention_kernels(Kernels& kernels);
void fill_bf16dot_linear_kernels(Kernels& kernels);  // x86 with AVX512_BF16 only
// Where adding is cheaper than multiplying: x86 with AVX-512 VNNI only. The linears take the place
// of some that are there already.
void fill_winograd_linear_kernels(Kernels& kernels);
void fill_fold_encoder_attention_kernels(Kernels& kernels);
void fill_row_kernels(Kernels& kernels);  // norms, rope, activations, similarity
void fill_kv_append_kernels(Kernels& kernels);
void fill_attention_kernels(Kernels& kernels);  // attention, importance
void fill_encoder_attention_kernels(Kernels& kernels);
void fill_integer_encoder_attention_kernels(Kernels& kernels);

}  // namespace fq::backend::cpu
