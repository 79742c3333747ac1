// A token-reduction stage decides which rows of a sequence go on to the next op; apply.cc carries
// the decision out. One stage object per request, created for every prompt (no state survives it).
// Engine thread only. Calls (specs in engine/CONTRACT.md, "Token reduction"): call 0 before
// attention of layer 0 on the raw input rows, call l+1 after the attention residual of layer l,
// before its MLP, on the un-normalised residual stream.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "framequilt/request.h"
#include "framequilt/status.h"
#include "src/backend/backend.h"

namespace fq::reduction {

// What a stage is told about the prompt before call 0.
struct PromptLayout {
  std::span<const int32_t>
      slots;       // per row: -1 text, else 0..period-1; rows with equal slot may merge
  int period = 0;  // P, number of slots
  int layers = 0;  // real depth
};

struct StageInput {
  int call = 0;
  const float* x = nullptr;  // [rows, width]
  int64_t stride = 0;
  int64_t rows = 0, width = 0;
  const float* importance = nullptr;  // [rows], if it was asked for, else nullptr
};

// The decision. Row order never changes. Empty keep == everything stays.
struct RowPlan {
  bool unchanged = true;
  std::vector<int32_t> keep;  // ascending rows that survive
  std::vector<int32_t> root;  // per input row: the surviving row it is averaged into (itself if
                              // kept); empty: no merging, rows not kept are dropped
};

class Stage {
 public:
  virtual ~Stage() = default;
  // Whether the attention just before `call` has to supply the importance of rows, and from how
  // many last queries.
  virtual int importance_queries(int call) const = 0;  // 0: not wanted
  // Fills `plan` (reused between calls). Never fails: a budget that cannot be met is reported, not
  // thrown.
  virtual void decide(const StageInput& input, RowPlan* plan, ThreadPool& pool) = 0;
  // True once no later call can change anything.
  virtual bool finished() const = 0;
  virtual const ReductionReport& report() const = 0;
};

// Errors: invalid_argument (cost outside (0, 1], bounds not finite, slots outside the period, ...).
// No visual rows, or no reduction asked for: the stage "none".
Result<std::unique_ptr<Stage>> make_stage(const Reduction& options, const PromptLayout& layout,
                                          const backend::Backend& backend);

// Carries a plan out on the rows in place: averages groups (float32, members in row order), then
// compacts x and every per-row int32 array in `columns`. Returns the new number of rows.
int64_t apply_plan(const RowPlan& plan, float* x, int64_t stride, int64_t rows, int64_t width,
                   std::span<int32_t*> columns);

}  // namespace fq::reduction
