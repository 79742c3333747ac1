// Checks what a request asks for and makes its stage.

#include <algorithm>
#include <cmath>
#include <string>

#include "src/reduction/framefusion/framefusion.h"
#include "src/reduction/none/none.h"
#include "src/reduction/stage.h"

namespace fq::reduction {
namespace {

// More queries than this would be a second attention pass, not a ranking of rows.
constexpr int kMaxImportanceQueries = 64;
constexpr int kMaxBudgetLayers = 1 << 16;

Error invalid(std::string what, std::string hint = "") {
  return {Code::kInvalidArgument, "reduction: " + std::move(what), std::move(hint)};
}

Status validate(const FrameFusionOptions& options) {
  if (!(options.cost > 0.0 && options.cost <= 1.0)) {
    return invalid("cost is " + std::to_string(options.cost) + ", must be in (0, 1]",
                   "cost is the average share of visual tokens kept, 0.3 keeps 30%");
  }
  if (!std::isfinite(options.similarity_lower_bound)) {
    return invalid("similarity_lower_bound is not finite");
  }
  if (!std::isfinite(options.ratio_lower_bound)) return invalid("ratio_lower_bound is not finite");
  if (options.budget_layers < 0 || options.budget_layers > kMaxBudgetLayers) {
    return invalid("budget_layers is " + std::to_string(options.budget_layers) +
                       ", must be in [0, " + std::to_string(kMaxBudgetLayers) + "]",
                   "0 takes the model's real depth");
  }
  if (options.importance_queries < 1 || options.importance_queries > kMaxImportanceQueries) {
    return invalid("importance_queries is " + std::to_string(options.importance_queries) +
                   ", must be in [1, " + std::to_string(kMaxImportanceQueries) + "]");
  }
  return {};
}

Status validate(const PromptLayout& layout) {
  if (layout.layers < 1) return invalid("layers is " + std::to_string(layout.layers));
  if (layout.period < 0) return invalid("period is " + std::to_string(layout.period));
  for (size_t row = 0; row < layout.slots.size(); ++row) {
    const int32_t slot = layout.slots[row];
    if (slot < -1 || slot >= layout.period) {
      return invalid("slot " + std::to_string(slot) + " of row " + std::to_string(row) +
                         " is not in [-1, " + std::to_string(layout.period) + ")",
                     "-1 marks text, the others run from 0 to period - 1");
    }
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<Stage>> make_stage(const Reduction& options, const PromptLayout& layout,
                                          const backend::Backend& backend) {
  if (!options.framefusion) return std::unique_ptr<Stage>(std::make_unique<NoReduction>());
  FQ_RETURN_IF_ERROR(validate(*options.framefusion));
  FQ_RETURN_IF_ERROR(validate(layout));
  const bool visual =
      std::any_of(layout.slots.begin(), layout.slots.end(), [](int32_t slot) { return slot >= 0; });
  if (!visual) return std::unique_ptr<Stage>(std::make_unique<NoReduction>());
  FQ_ASSIGN_OR_RETURN(const backend::SimilarityFn similarity, backend.similarity());
  return std::unique_ptr<Stage>(
      std::make_unique<FrameFusion>(*options.framefusion, layout, similarity));
}

}  // namespace fq::reduction
