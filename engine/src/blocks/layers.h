// Linears and norms bound to their weights and kernels: the pieces that every block is made of.
// Bound once, when an engine is created; immutable afterwards. Weights stay in the mapped model
// file.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <string>

#include "framequilt/status.h"
#include "src/backend/backend.h"
#include "src/core/aligned.h"
#include "src/model/directory.h"
#include "src/quant/linear_weights.h"

namespace fq::blocks {

// Where blocks find their weights and kernels while they are being bound.
struct Binder {
  const model::ModelDirectory& directory;
  const backend::Backend& backend;
  ThreadPool& pool;
  // Instead of what the model says about the inputs of its linears.
  std::optional<model::ActivationChoice> activations;
  // Quantized and rounded inputs are multiplied as float32 numbers: the definition, slowly.
  bool exact = false;
};

class Linear;

// Linears that are computed together (run_together), where they stay.
struct LinearCall {
  std::array<const Linear*, ops::LinearsAhead::kMost> linears = {};
  bool by_turns = false;  // the second multiplies what the first has written

  std::span<const Linear* const> all() const {
    return {linears.begin(), std::find(linears.begin(), linears.end(), nullptr)};
  }
};

class Linear {
 public:
  static Result<Linear> bind(const Binder& binder, const std::string& slot, bool bias);

  int out() const { return weights_.out; }
  int in() const { return weights_.in; }
  const quant::LinearWeights& weights() const { return weights_; }
  const model::ActivationFormat& activations() const { return activations_; }

  // y[rows, out] = x[rows, in] W^T + bias, as arguments that a caller may add to.
  ops::LinearArgs args(const float* x, int64_t x_stride, int64_t rows, float* y,
                       int64_t y_stride) const {
    return {.x = x,
            .x_stride = x_stride,
            .rows = rows,
            .w = &weights_,
            .y = y,
            .y_stride = y_stride,
            .activations = activations_,
            .ahead = ahead_.count > 0 ? &ahead_ : nullptr};
  }
  // What is likely to be computed after a call that begins with this linear: its weights are asked
  // for while threads wait. Makes no difference to results.
  void lead_to(const LinearCall& next);
  // `args`, and what follows them, are from args() of this linear and of others like it.
  void run(const ops::LinearArgs& args, ThreadPool& pool) const {
    if (exact_) return run_exact(args, pool);
    fn_(args, pool);
  }
  // y[rows, out] = (or +=) x[rows, in] W^T + bias
  void run(const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride,
           bool accumulate, ThreadPool& pool) const {
    ops::LinearArgs one = args(x, x_stride, rows, y, y_stride);
    one.accumulate = accumulate;
    run(one, pool);
  }
  // Whether one call computes both from the same inputs: the same kernel and codes of the inputs.
  bool joins(const Linear& other) const {
    return fn_ == other.fn_ && exact_ == other.exact_ && activations_ == other.activations_ &&
           weights_.format == other.weights_.format && weights_.in == other.weights_.in;
  }

 private:
  void bind_row_sums(ThreadPool& pool);
  void run_exact(const ops::LinearArgs& args, ThreadPool& pool) const;

  quant::LinearWeights weights_;
  model::ActivationFormat activations_;
  backend::LinearFn fn_ = nullptr;
  ops::LinearsAhead ahead_;
  bool exact_ = false;  // fn_ takes float32 inputs, which are quantized or rounded before
  AlignedBuffer<float> row_sums_;  // what weights_.row_sums points to if the directory lacks it
};

// Runs linears of the same inputs in as few calls as their formats allow; list[i] are arguments of
// linears[i]. Those of a layer have the same format unless a model mixes precisions.
void run_together(std::span<const Linear* const> linears, std::span<ops::LinearArgs> list,
                  ThreadPool& pool);

class Norm {
 public:
  static Result<Norm> bind(const Binder& binder, const std::string& slot,
                           const model::NormSpec& spec, int width);

  // y[rows, width] = norm(x[rows, width]); y may be x.
  void run(const float* x, float* y, int64_t rows, ThreadPool& pool) const {
    fn_({.x = x,
         .y = y,
         .rows = rows,
         .width = width_,
         .weight = weight_,
         .bias = bias_,
         .eps = eps_},
        pool);
  }

 private:
  int width_ = 0;
  const float* weight_ = nullptr;
  const float* bias_ = nullptr;
  float eps_ = 0;
  backend::NormFn fn_ = nullptr;
};

}  // namespace fq::blocks
