#include "src/blocks/layers.h"

#include "src/quant/activations.h"
#include "src/quant/row_sums.h"

namespace fq::blocks {

Result<Linear> Linear::bind(const Binder& binder, const std::string& slot, bool bias) {
  Linear linear;
  FQ_ASSIGN_OR_RETURN(linear.weights_, quant::bind_linear(binder.directory, slot, bias));
  const model::ModelSpec& spec = binder.directory.spec();
  linear.activations_ = binder.activations ? binder.activations->of(slot, linear.weights_.format,
                                                                    spec.decoder.tied_embedding)
                                           : spec.linears.at(slot).activations;
  linear.exact_ = binder.exact && !linear.activations_.float32();
  FQ_ASSIGN_OR_RETURN(linear.fn_, binder.backend.linear(linear.weights_.format,
                                                        linear.exact_ ? model::ActivationFormat{}
                                                                      : linear.activations_));
  if (linear.activations_.needs_row_sums() && !linear.exact_) linear.bind_row_sums(binder.pool);
  return linear;
}

// Rows become the numbers that their codes stand for, or that they are rounded to.
void Linear::run_exact(const ops::LinearArgs& args, ThreadPool& pool) const {
  static thread_local AlignedBuffer<float> own;  // of the engine thread; the pool writes to it
  const int64_t in = weights_.in;
  own.reserve(static_cast<size_t>(args.rows * in));
  float* const rows = own.data();
  pool.parallel_for(args.rows, [&](int64_t r, int) {
    if (activations_.bf16) return quant::round_row(args.x + r * args.x_stride, in, rows + r * in);
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

// Without the stored sums all weights are read once: a directory that was converted for other
// inputs, or before sums were stored.
void Linear::bind_row_sums(ThreadPool& pool) {
  if (weights_.row_sums != nullptr) return;
  row_sums_.reserve(static_cast<size_t>(weights_.tiles) * quant::kTileRows);
  pool.parallel_for(weights_.tiles, [&](int64_t tile, int) {
    quant::row_sums_of_tile(weights_, static_cast<int>(tile),
                            row_sums_.data() + tile * quant::kTileRows);
  });
  weights_.row_sums = row_sums_.data();
}

void Linear::lead_to(const LinearCall& next) {
  ahead_ = {};
  ahead_.by_turns = next.by_turns;
  for (const Linear* linear : next.all()) {
    if (!next.linears[0]->joins(*linear)) break;
    ahead_.add(linear->weights_);
  }
}

void run_together(std::span<const Linear* const> linears, std::span<ops::LinearArgs> list,
                  ThreadPool& pool) {
  const ops::LinearsAhead* const ahead = list[0].ahead;
  for (size_t first = 0; first < list.size();) {
    size_t end = first + 1;
    for (; end < list.size() && linears[first]->joins(*linears[end]); ++end)
      list[end - 1].next = &list[end];
    list[first].ahead = end == list.size() ? ahead : nullptr;
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
