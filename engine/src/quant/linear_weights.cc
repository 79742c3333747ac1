// Binding of a linear's tensors to a view, and the scalar reference of reading its weights. Views
// point into the mapped model file and live as long as it does. Any thread.
#include "src/quant/linear_weights.h"

#include <bit>
#include <cstring>
#include <vector>

#include "src/quant/number.h"

namespace fq::quant {
namespace {

using model::TensorView;
using model::WeightFormat;

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

// The tensor `name` of the given type and shape.
Result<const TensorView*> tensor(const model::ModelDirectory& directory, const std::string& name,
                                 DType dtype, const std::vector<int64_t>& shape) {
  const TensorView* const view = directory.find(name);
  if (view == nullptr) {
    return Error{Code::kNotFound, "tensor '" + name + "' is missing", "convert the model again"};
  }
  if (view->dtype != dtype || view->shape != shape) {
    return Error{Code::kCorruptModel,
                 "tensor '" + name + "' is " + std::string(dtype_name(view->dtype)) +
                     shape_text(view->shape) + ", expected " + std::string(dtype_name(dtype)) +
                     shape_text(shape),
                 "convert the model again"};
  }
  return view;
}

// Block tensors are read with aligned 32-byte loads on some machines; the format aligns them to 64.
Status check_aligned(const TensorView& view, const std::string& name) {
  if (reinterpret_cast<uintptr_t>(view.bytes.data()) % 32 == 0) return {};
  return Error{Code::kCorruptModel, "tensor '" + name + "' is not aligned in its file",
               "convert the model again"};
}

}  // namespace

Result<LinearWeights> bind_linear(const model::ModelDirectory& directory, const std::string& name,
                                  bool bias) {
  const auto& linears = directory.spec().linears;
  const auto found = linears.find(name);
  if (found == linears.end()) {
    return Error{Code::kNotFound, "linear '" + name + "' is not described in config.json",
                 "convert the model again"};
  }
  const model::LinearSpec& spec = found->second;
  if (spec.out < 1 || spec.in < 1) {
    return Error{Code::kCorruptModel,
                 "linear '" + name + "' has shape " + shape_text({spec.out, spec.in}), ""};
  }
  LinearWeights w;
  w.format = spec.format;
  w.out = spec.out;
  w.in = spec.in;
  w.tiles = (w.out + kRowPadding - 1) / kRowPadding * (kRowPadding / kTileRows);
  const int64_t tiles = w.tiles;

  const auto take = [&](const std::string& suffix, DType dtype,
                        const std::vector<int64_t>& shape) -> Result<const TensorView*> {
    FQ_ASSIGN_OR_RETURN(const TensorView* view, tensor(directory, name + suffix, dtype, shape));
    w.bytes += static_cast<int64_t>(view->bytes.size());
    return view;
  };

  switch (spec.format.kind) {
    case WeightFormat::Kind::kF32: {
      FQ_ASSIGN_OR_RETURN(const TensorView* data,
                          take(".weight", DType::kF32, {tiles, w.in, kTileRows}));
      FQ_RETURN_IF_ERROR(check_aligned(*data, name + ".weight"));
      w.data = data->bytes.data();
      w.data_bytes = std::ssize(data->bytes);
      break;
    }
    case WeightFormat::Kind::kBF16: {
      FQ_ASSIGN_OR_RETURN(const TensorView* data,
                          take(".weight", DType::kBF16, {tiles, (w.in + 1) / 2, kTileRows, 2}));
      FQ_RETURN_IF_ERROR(check_aligned(*data, name + ".weight"));
      w.data = data->bytes.data();
      w.data_bytes = std::ssize(data->bytes);
      break;
    }
    case WeightFormat::Kind::kAffine: {
      const WeightFormat& f = spec.format;
      if (!model::is_affine_format(f)) {
        return Error{Code::kUnsupported,
                     "linear '" + name + "' has " + std::to_string(f.bits) +
                         "-bit weights in groups of " + std::to_string(f.group) + " with " +
                         std::string(dtype_name(f.scale)) + " scales",
                     std::string("supported are ") + model::kAffineFormats};
      }
      w.set_groups();
      FQ_ASSIGN_OR_RETURN(
          const TensorView* codes,
          take(".codes", DType::kU8, {tiles, w.padded_in() / 32 * f.bits, kTileRows, 4}));
      FQ_RETURN_IF_ERROR(check_aligned(*codes, name + ".codes"));
      FQ_ASSIGN_OR_RETURN(const TensorView* scales,
                          take(".scales", f.scale, {tiles, w.groups, kTileRows}));
      w.data = codes->bytes.data();
      w.data_bytes = std::ssize(codes->bytes);
      w.scales = scales->bytes.data();
      const std::vector<int64_t> steps = {tiles, w.steps, kTileRows};
      if (f.stepped()) {
        FQ_ASSIGN_OR_RETURN(const TensorView* view, take(".scale_steps", DType::kF16, steps));
        w.scale_steps = view->bytes.data();
      }
      if (f.offset) {
        FQ_ASSIGN_OR_RETURN(const TensorView* offsets,
                            take(".offsets", f.scale, {tiles, w.groups, kTileRows}));
        w.offsets = offsets->bytes.data();
        if (f.stepped()) {
          FQ_ASSIGN_OR_RETURN(const TensorView* view, take(".offset_steps", DType::kF16, steps));
          w.offset_steps = view->bytes.data();
        }
      } else if (!f.symmetric) {
        FQ_ASSIGN_OR_RETURN(const TensorView* zeros,
                            take(".zeros", DType::kU8, {tiles, w.groups, kTileRows}));
        w.zeros = reinterpret_cast<const uint8_t*>(zeros->bytes.data());
      }
      break;
    }
  }
  if (spec.activations.needs_row_sums() && directory.find(name + ".row_sums") != nullptr) {
    FQ_ASSIGN_OR_RETURN(const TensorView* view, take(".row_sums", DType::kF32, {tiles, kTileRows}));
    w.row_sums = view->f32();
  }
  if (bias) {
    FQ_ASSIGN_OR_RETURN(const TensorView* view,
                        tensor(directory, name + ".bias", DType::kF32, {w.out}));
    w.bias = view->f32();
  }
  return w;
}

void LinearWeights::set_groups() {
  group = format.group == 0 ? padded_in() : format.group;
  groups = (in + group - 1) / group;
  if (!format.stepped()) return;
  steps = (in + model::kStepInputs - 1) / model::kStepInputs;
  step_shift = std::countr_zero(static_cast<unsigned>(model::kStepInputs / group));
}

Planes planes_of(int bits) {
  switch (bits) {
    case 3:
      return {2, {{2, 0, 2}, {1, 2, 1}}};
    case 5:
      return {2, {{4, 0, 4}, {1, 4, 1}}};
    case 6:
      return {2, {{4, 0, 4}, {2, 4, 2}}};
    default:
      return {1, {{bits, 0, bits}, {}}};
  }
}

PlaneBit plane_bit(const Plane& plane, int input) {
  const int per_block = kInputPadding / plane.bits;
  const int in_block = input % per_block;
  return {input / per_block, in_block % 4, in_block / 4 * plane.bits};
}

namespace {

// Where `at` of `count` of a row lies in a table [tiles, count, 8].
int64_t table_index(int row, int64_t count, int64_t at) {
  return (row / kTileRows * count + at) * kTileRows + row % kTileRows;
}

template <class T>
T entry(const void* table, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(table) + index * int64_t{sizeof(T)},
              sizeof value);
  return value;
}

// A number of a group in a table of the scales' type.
float group_number(const LinearWeights& w, const void* table, const void* steps, int row,
                   int group) {
  const int64_t at = table_index(row, w.groups, group);
  switch (w.format.scale) {
    case DType::kF32:
      return entry<float>(table, at);
    case DType::kI8: {
      const int64_t step = table_index(row, w.steps, group >> w.step_shift);
      return static_cast<float>(entry<int8_t>(table, at)) *
             float_from_half(entry<uint16_t>(steps, step));
    }
    default:
      return float_from_half(entry<uint16_t>(table, at));
  }
}

}  // namespace

float group_scale(const LinearWeights& w, int row, int group) {
  return group_number(w, w.scales, w.scale_steps, row, group);
}

float group_offset(const LinearWeights& w, int row, int group) {
  return group_number(w, w.offsets, w.offset_steps, row, group);
}

int weight_zero(const LinearWeights& w, int row, int group) {
  return w.zeros != nullptr ? w.zeros[table_index(row, w.groups, group)] : 1 << (w.format.bits - 1);
}

int weight_code_at(const LinearWeights& w, int row, int col) {
  const int bits = w.format.bits;
  const int64_t superblock =
      int64_t{row / kTileRows} * (w.padded_in() / kInputPadding) + col / kInputPadding;
  const auto* block = static_cast<const uint8_t*>(w.data) + superblock * bits * kTileRows * 4;
  const Planes planes = planes_of(bits);
  int code = 0;
  for (int p = 0; p < planes.count; ++p) {
    const Plane& plane = planes.plane[p];
    const PlaneBit at = plane_bit(plane, col % kInputPadding);
    const uint8_t byte = block[(at.block * kTileRows + row % kTileRows) * 4 + at.byte];
    code |= (byte >> at.bit & ((1 << plane.bits) - 1)) << plane.shift;
    block += plane.blocks * kTileRows * 4;
  }
  return code;
}

float weight_at(const LinearWeights& w, int row, int col) {
  const int64_t tile = row / kTileRows;
  const int r = row % kTileRows;
  if (w.format.kind == WeightFormat::Kind::kF32) {
    float value;
    const auto* at =
        static_cast<const std::byte*>(w.data) + ((tile * w.in + col) * kTileRows + r) * 4;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  if (w.format.kind == WeightFormat::Kind::kBF16) {
    const int64_t pairs = (w.in + 1) / 2;
    uint16_t value;
    const auto* at = static_cast<const std::byte*>(w.data) +
                     (((tile * pairs + col / 2) * kTileRows + r) * 2 + col % 2) * 2;
    std::memcpy(&value, at, sizeof value);
    return float_from_bf16(value);
  }
  const int group = col / w.group;
  const float scale = group_scale(w, row, group);
  const int code = weight_code_at(w, row, col);
  if (w.offsets != nullptr) {
    const float product = static_cast<float>(code) * scale;
    return product + group_offset(w, row, group);
  }
  return static_cast<float>(code - weight_zero(w, row, group)) * scale;
}

void dequantize_row(const LinearWeights& w, int row, float* out) {
  for (int col = 0; col < w.in; ++col) out[col] = weight_at(w, row, col);
}

}  // namespace fq::quant
