// Weights of one linear as the kernels read them: a view into the mapped model file.
// Layouts are normative in engine/CONTRACT.md ("Weight formats"); quantizer and fake-quant
// reference are beside it.
#pragma once

#include <cstdint>
#include <string>

#include "framequilt/status.h"
#include "src/model/directory.h"
#include "src/model/spec.h"

namespace fq::quant {

inline constexpr int kTileRows = 8;       // output rows interleaved in one tile
inline constexpr int kRowPadding = 16;    // output rows are padded to this: scale or weight zero
inline constexpr int kInputPadding = 32;  // affine codes are padded along the input to this

struct LinearWeights {
  model::WeightFormat format;
  int out = 0, in = 0;
  int tiles = 0;                 // ceil(out / 16) * 2
  int groups = 1;                // kAffine: ceil(in / group)
  int group = 0;                 // kAffine: inputs per group (== padded in when per row)
  const void* data = nullptr;    // codes (U8), BF16 or F32 tiles
  const void* scales = nullptr;  // kAffine: F16, F32 or I8 [tiles, groups, 8]
  // kAffine, asymmetric: U8 [tiles, groups, 8]. Symmetric: nullptr, zero is 2^(bits-1).
  const uint8_t* zeros = nullptr;
  const void* offsets = nullptr;  // kAffine with offset: of the scales' type, [tiles, groups, 8]
  // Scales and offsets in I8: F16 [tiles, steps, 8], which they are times.
  const void *scale_steps = nullptr, *offset_steps = nullptr;
  int steps = 0;                // ceil(in / model::kStepInputs)
  int step_shift = 0;           // a step has 1 << step_shift groups
  const float* bias = nullptr;  // [out] or nullptr
  // [tiles * 8] sums of each row's weights (quant/row_sums.h): what the zeros of asymmetric
  // activations cost. Of the model directory if it has them; else nullptr, or whoever bound this
  // owns them.
  const float* row_sums = nullptr;
  int64_t data_bytes = 0;  // of `data`
  int64_t bytes = 0;       // of all stored tensors above but the bias, for reports

  // Sets groups, group and steps of an affine format, from it and `in`.
  void set_groups();
  int padded_in() const { return (in + kInputPadding - 1) / kInputPadding * kInputPadding; }
};

// Finds and checks the tensors of slot `name` ("decoder.layers.0.attention.q").
// Errors: not_found, corrupt_model (shapes, dtypes), unsupported.
Result<LinearWeights> bind_linear(const model::ModelDirectory& directory, const std::string& name,
                                  bool bias);

// The planes of a superblock of 32 inputs (engine/CONTRACT.md, 1.3), in order.
struct Plane {
  int bits = 0;    // 1, 2, 4 or 8
  int shift = 0;   // the code bits it holds begin here
  int blocks = 0;  // of 32 bytes: bits
};
struct Planes {
  int count = 0;
  Plane plane[2];
};
Planes planes_of(int bits);

// Where the bits of an input of a superblock lie in a plane: a byte of a row's words, and a bit.
struct PlaneBit {
  int block = 0;  // of the plane
  int byte = 0;   // 0..3, of the row's word
  int bit = 0;
};
PlaneBit plane_bit(const Plane& plane, int input);

// Parameters of a group, as floats: value = code * scale + shift.
float group_scale(const LinearWeights& w, int row, int group);
int weight_zero(const LinearWeights& w, int row, int group);     // not with offset
float group_offset(const LinearWeights& w, int row, int group);  // with offset only
int weight_code_at(const LinearWeights& w, int row, int col);    // kAffine

// Scalar references. One weight / one output row as float32 (in order of the input axis).
float weight_at(const LinearWeights& w, int row, int col);
void dequantize_row(const LinearWeights& w, int row, float* out);

}  // namespace fq::quant
