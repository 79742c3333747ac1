#include "src/blocks/layers.h"

#include <algorithm>
#include <vector>

#include "src/quant/activations.h"

namespace fq::blocks {

Result<Linear> Linear::bind(const Binder& binder, const std::string& slot, bool bias) {
  Linear linear;
  FQ_ASSIGN_OR_RETURN(linear.weights_, quant::bind_linear(binder.directory, slot, bias));
  linear.activations_ = binder.directory.spec().linears.at(slot).activations;
  const bool affine = linear.weights_.format.kind == model::WeightFormat::Kind::kAffine;
  if (binder.activations && affine) linear.activations_ = *binder.activations;
  linear.exact_ = binder.exact && linear.activations_.quantized();
  FQ_ASSIGN_OR_RETURN(linear.fn_, binder.backend.linear(linear.weights_.format,
                                                        linear.exact_ ? model::ActivationFormat{}
                                                                      : linear.activations_));
  if (!linear.activations_.symmetric && !linear.exact_) {
    FQ_RETURN_IF_ERROR(linear.bind_row_sums(binder));
  }
  return linear;
}

// Rows become the numbers that their codes stand for.
void Linear::run_exact(const ops::LinearArgs& args, ThreadPool& pool) const {
  static thread_local AlignedBuffer<float> own;  // of the engine thread; the pool writes to it
  const int64_t in = weights_.in;
  own.reserve(static_cast<size_t>(args.rows * in));
  float* const rows = own.data();
  pool.parallel_for(args.rows, [&](int64_t r, int) {
    static thread_local AlignedBuffer<int8_t> codes;
    codes.reserve(static_cast<size_t>(in));
    const quant::QuantizedRow row =
        quant::quantize_row(args.x + r * args.x_stride, in, activations_, codes.data());
    for (int64_t i = 0; i < in; ++i) {
      rows[r * in + i] = static_cast<float>(codes[static_cast<size_t>(i)] - row.zero) * row.scale;
    }
  });
  for (const ops::LinearArgs* next = &args; next != nullptr; next = next->next) {
    ops::LinearArgs one = *next;
    one.x = rows;
    one.x_stride = in;
    one.activations = {};
    one.next = nullptr;
    fn_(one, pool);
  }
}

// One product with inputs of 1 reads all weights once; only asymmetric inputs need it.
Status Linear::bind_row_sums(const Binder& binder) {
  FQ_ASSIGN_OR_RETURN(const backend::LinearFn sum, binder.backend.linear(weights_.format, {}));
  const size_t padded = static_cast<size_t>(weights_.tiles) * quant::kTileRows;
  row_sums_.reserve(padded);
  std::fill_n(row_sums_.data(), padded, 0.0f);
  const std::vector<float> ones(static_cast<size_t>(weights_.in), 1.0f);
  quant::LinearWeights unbiased = weights_;
  unbiased.bias = nullptr;
  sum({.x = ones.data(),
       .x_stride = weights_.in,
       .rows = 1,
       .w = &unbiased,
       .y = row_sums_.data(),
       .y_stride = weights_.out},
      binder.pool);
  weights_.row_sums = row_sums_.data();
  return {};
}

void run_together(std::span<const Linear* const> linears, std::span<ops::LinearArgs> list,
                  ThreadPool& pool) {
  for (size_t first = 0; first < list.size();) {
    size_t end = first + 1;
    for (; end < list.size() && linears[first]->joins(*linears[end]); ++end)
      list[end - 1].next = &list[end];
    linears[first]->run(list[first], pool);
    first = end;
  }
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
