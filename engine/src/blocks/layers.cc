#include "src/blocks/layers.h"

namespace fq::blocks {

Result<Linear> Linear::bind(const Binder& binder, const std::string& slot, bool bias) {
  Linear linear;
  FQ_ASSIGN_OR_RETURN(linear.weights_, quant::bind_linear(binder.directory, slot, bias));
  FQ_ASSIGN_OR_RETURN(linear.fn_, binder.backend.linear(linear.weights_.format));
  return linear;
}

namespace {

// A float32 vector of `width` elements.
Result<const float*> find_vector(const Binder& binder, const std::string& name, int64_t width) {
  const model::TensorView* tensor = binder.directory.find(name);
  if (tensor == nullptr) {
    return Error{Code::kNotFound, "tensor '" + name + "' is not in the model directory",
                 "convert the model again"};
  }
  if (tensor->dtype != DType::kF32 || tensor->elements() != width) {
    return Error{Code::kCorruptModel,
                 "tensor '" + name + "' is not F32 with " + std::to_string(width) + " elements",
                 "convert the model again"};
  }
  return tensor->f32();
}

}  // namespace

Result<Norm> Norm::bind(const Binder& binder, const std::string& slot, const model::NormSpec& spec,
                        int width) {
  Norm norm;
  norm.width_ = width;
  norm.eps_ = spec.eps;
  FQ_ASSIGN_OR_RETURN(norm.weight_, find_vector(binder, slot + ".weight", width));
  if (spec.kind == model::NormKind::kLayer) {
    FQ_ASSIGN_OR_RETURN(norm.bias_, find_vector(binder, slot + ".bias", width));
  }
  FQ_ASSIGN_OR_RETURN(norm.fn_, binder.backend.norm(spec.kind));
  return norm;
}

}  // namespace fq::blocks
