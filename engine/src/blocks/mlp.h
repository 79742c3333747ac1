// Feed-forward block of a pre-norm layer: x += down(act(...)(norm(x))).
#pragma once

#include <optional>

#include "src/blocks/layers.h"
#include "src/core/aligned.h"

namespace fq::blocks {

class Mlp {
 public:
  // `layer` is the slot prefix, e.g. "decoder.layers.3".
  static Result<Mlp> bind(const Binder& binder, const std::string& layer,
                          const model::MlpSpec& spec, const model::NormSpec& norm, int width);

  // As in DecoderAttention.
  LinearCall first_call() const { return {{&*up_, gate_ ? &*gate_ : nullptr}, gate_.has_value()}; }
  void lead_to(const LinearCall& next);

  // Floats of scratch for `rows` rows.
  int64_t scratch_floats(int64_t rows) const;
  // x[rows, width] in place.
  void forward(float* x, int64_t rows, float* scratch, ThreadPool& pool) const;

 private:
  model::MlpSpec spec_;
  int width_ = 0;
  std::optional<Norm> norm_;
  std::optional<Linear> gate_, up_, down_;
};

}  // namespace fq::blocks
