// Binding of a linear's tensors to a view, and the scalar reference of reading its weights. Views
// point into the mapped model file and live as long as it does. Any thread.
#include "src/quant/linear_weights.h"

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
      break;
    }
    case WeightFormat::Kind::kBF16: {
      FQ_ASSIGN_OR_RETURN(const TensorView* data,
                          take(".weight", DType::kBF16, {tiles, (w.in + 1) / 2, kTileRows, 2}));
      FQ_RETURN_IF_ERROR(check_aligned(*data, name + ".weight"));
      w.data = data->bytes.data();
      break;
    }
    case WeightFormat::Kind::kAffine: {
      const WeightFormat& f = spec.format;
      const bool group_ok = f.group == 0 || f.group == 32 || f.group == 64 || f.group == 128;
      if ((f.bits != 4 && f.bits != 8) || !group_ok ||
          (f.scale != DType::kF16 && f.scale != DType::kF32)) {
        return Error{
            Code::kUnsupported,
            "linear '" + name + "' has " + std::to_string(f.bits) + "-bit weights in groups of " +
                std::to_string(f.group) + " with " + std::string(dtype_name(f.scale)) + " scales",
            "4 or 8 bits, groups of 32, 64, 128 or 0 (per row), F16 or F32 scales are supported"};
      }
      w.group = f.group == 0 ? w.padded_in() : f.group;
      w.groups = (w.in + w.group - 1) / w.group;
      const int64_t per_block = f.bits == 8 ? 4 : 8;
      FQ_ASSIGN_OR_RETURN(
          const TensorView* codes,
          take(".codes", DType::kU8, {tiles, w.padded_in() / per_block, kTileRows, 4}));
      FQ_RETURN_IF_ERROR(check_aligned(*codes, name + ".codes"));
      FQ_ASSIGN_OR_RETURN(const TensorView* scales,
                          take(".scales", f.scale, {tiles, w.groups, kTileRows}));
      w.data = codes->bytes.data();
      w.scales = scales->bytes.data();
      if (!f.symmetric) {
        FQ_ASSIGN_OR_RETURN(const TensorView* zeros,
                            take(".zeros", DType::kU8, {tiles, w.groups, kTileRows}));
        w.zeros = reinterpret_cast<const uint8_t*>(zeros->bytes.data());
      }
      break;
    }
  }
  if (bias) {
    FQ_ASSIGN_OR_RETURN(const TensorView* view,
                        tensor(directory, name + ".bias", DType::kF32, {w.out}));
    w.bias = view->f32();
  }
  return w;
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
  const auto* codes = static_cast<const uint8_t*>(w.data);
  const int64_t group = (tile * w.groups + col / w.group) * kTileRows + r;
  uint8_t code;
  if (w.format.bits == 8) {
    const int64_t block = tile * (w.padded_in() / 4) + col / 4;
    code = codes[(block * kTileRows + r) * 4 + col % 4];
  } else {
    const int64_t block = tile * (w.padded_in() / 8) + col / 8;
    const uint8_t both = codes[(block * kTileRows + r) * 4 + col % 4];
    code = col % 8 < 4 ? both & 0xF : both >> 4;
  }
  float scale;
  if (w.format.scale == DType::kF32) {
    std::memcpy(&scale, static_cast<const std::byte*>(w.scales) + group * 4, sizeof scale);
  } else {
    uint16_t half;
    std::memcpy(&half, static_cast<const std::byte*>(w.scales) + group * 2, sizeof half);
    scale = float_from_half(half);
  }
  const int zero = w.zeros != nullptr ? w.zeros[group] : 1 << (w.format.bits - 1);
  return static_cast<float>(code - zero) * scale;
}

void dequantize_row(const LinearWeights& w, int row, float* out) {
  for (int col = 0; col < w.in; ++col) out[col] = weight_at(w, row, col);
}

}  // namespace fq::quant
