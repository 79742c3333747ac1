// The tensors that a description implies: every linear (a weight matrix in some format) and every
// plain vector, by name. One place for the naming rules of engine/CONTRACT.md sections 1.2 and 1.3.
// Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "framequilt/types.h"
#include "src/model/spec.h"

namespace fq::model {

// A linear ("decoder.layers.0.attention.q") or a vector ("decoder.final_norm.weight").
struct SlotInfo {
  std::string name;
  bool linear = true;
  int64_t out = 0, in = 0;     // linear
  bool bias = false;           // linear: has a tensor name + ".bias"
  std::vector<int64_t> shape;  // vector: of its one F32 tensor
};

// Every slot of a valid description, decoder first, in running order.
std::vector<SlotInfo> slots(const ModelSpec& spec);

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  bool optional = false;  // a directory may lack it
};

// The tensors of a linear stored in `format`, without its bias.
std::vector<TensorInfo> linear_tensors(const std::string& name, int64_t out, int64_t in,
                                       const WeightFormat& format);

// Every tensor of a description whose `linears` table matches slots(spec), optional ones too.
std::vector<TensorInfo> tensors(const ModelSpec& spec);

}  // namespace fq::model
