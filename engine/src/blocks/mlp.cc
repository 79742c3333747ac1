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
  return mlp;
}

void Mlp::lead_to(const LinearCall& next) {
  up_->lead_to({{&*down_}});
  down_->lead_to(next);
}

int64_t Mlp::scratch_floats(int64_t rows) const { return rows * (width_ + int64_t{spec_.hidden}); }

void Mlp::forward(float* x, int64_t rows, float* scratch, ThreadPool& pool) const {
  const int64_t hidden = spec_.hidden;
  float* normed = scratch;
  float* up = normed + rows * width_;
  norm_->run(x, normed, rows, pool);
  // The activation is applied where a sum is complete: the widest rows of a layer go through memory
  // once.
  ops::LinearArgs list[] = {up_->args(normed, width_, rows, up, hidden), {}};
  if (gate_) {
    list[1] = gate_->args(normed, width_, rows, up, hidden);
    list[1].activation = spec_.activation;
    list[1].multiply = true;
    const Linear* const linears[] = {&*up_, &*gate_};
    run_together(linears, list, pool);
  } else {
    list[0].activation = spec_.activation;
    up_->run(list[0], pool);
  }
  down_->run(up, hidden, rows, x, width_, true, pool);
}

}  // namespace fq::blocks
