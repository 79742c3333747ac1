#include "src/blocks/mlp.h"

namespace fq::blocks {

Result<Mlp> Mlp::bind(const Binder& binder, const std::string& layer, const model::MlpSpec& spec,
                      const model::NormSpec& norm, int width) {
  Mlp mlp;
  mlp.spec_ = spec;
  mlp.width_ = width;
  FQ_ASSIGN_OR_RETURN(mlp.norm_, Norm::bind(binder, layer + ".mlp_norm", norm, width));
  if (spec.kind == model::MlpKind::kGated) {
    FQ_ASSIGN_OR_RETURN(mlp.gate_, Linear::bind(binder, layer + ".mlp.gate", spec.bias));
  }
  FQ_ASSIGN_OR_RETURN(mlp.up_, Linear::bind(binder, layer + ".mlp.up", spec.bias));
  FQ_ASSIGN_OR_RETURN(mlp.down_, Linear::bind(binder, layer + ".mlp.down", spec.bias));
  FQ_ASSIGN_OR_RETURN(mlp.activation_, binder.backend.activation(spec.activation));
  return mlp;
}

int64_t Mlp::scratch_floats(int64_t rows) const {
  return rows * (width_ + (gate_ ? 2 : 1) * int64_t{spec_.hidden});
}

void Mlp::forward(float* x, int64_t rows, float* scratch, ThreadPool& pool) const {
  const int64_t hidden = spec_.hidden;
  float* normed = scratch;
  float* up = normed + rows * width_;
  norm_->run(x, normed, rows, pool);
  up_->run(normed, width_, rows, up, hidden, false, pool);
  if (gate_) {
    float* gate = up + rows * hidden;
    gate_->run(normed, width_, rows, gate, hidden, false, pool);
    activation_({.kind = spec_.activation, .x = gate, .gate = up, .y = up, .count = rows * hidden},
                pool);
  } else {
    activation_(
        {.kind = spec_.activation, .x = up, .gate = nullptr, .y = up, .count = rows * hidden},
        pool);
  }
  down_->run(up, hidden, rows, x, width_, true, pool);
}

}  // namespace fq::blocks
