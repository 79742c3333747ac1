// FrameFusion (arXiv 2501.01986, sections 3 and 4): while layers are shallow, a visual row that
// resembles the previous surviving row of its slot is averaged into it; then one pruning by
// attention meets the budget; then nothing changes. Owned by its sequence, made anew for every
// prompt; engine thread only. Vectors are kept between calls.
//
// The stage follows the rows by itself: it compacts its own copy of the slots along with the plan
// it hands out, so the caller has to carry every plan out. `FrameFusionOptions::merge_separators`
// is not read here: whoever makes the slots of a prompt (the runtime) gives newline rows the slot
// -1 when it is false.
//
// What the published reference leaves open or gets wrong is answered in engine/CONTRACT.md,
// section 3.
#pragma once

#include <cstdint>
#include <vector>

#include "src/backend/backend.h"
#include "src/reduction/framefusion/budget.h"
#include "src/reduction/stage.h"

namespace fq::reduction {

class FrameFusion final : public Stage {
 public:
  // `options` and `layout` were validated; at least one slot is >= 0.
  FrameFusion(const FrameFusionOptions& options, const PromptLayout& layout,
              backend::SimilarityFn similarity);

  int importance_queries(int call) const override;
  void decide(const StageInput& input, RowPlan* plan, ThreadPool& pool) override;
  bool finished() const override { return prune_done_; }
  const ReductionReport& report() const override { return report_; }

  // Shares merged so far by calls that stayed below the budget. For tests.
  std::span<const double> shares() const { return shares_; }
  bool merging_done() const { return merge_done_; }

 private:
  void merge(const StageInput& input, RowPlan* plan, ReductionCall* call, ThreadPool& pool);
  void prune(const StageInput& input, RowPlan* plan, ReductionCall* call);
  void miss_budget(ReductionCall* call);
  void end_both_phases();
  void link_predecessors();
  void select_most_similar(int64_t count);
  void write_merge_plan(RowPlan* plan, int64_t merged) const;
  // Keeps the slots of the rows that the plan keeps.
  void compact_slots(const RowPlan& plan);
  void record(ReductionCall call);
  double median_similarity();

  const FrameFusionOptions options_;
  const backend::SimilarityFn similarity_;
  const int layers_;          // real depth
  const int budget_layers_;   // depth of the budget formula
  int64_t first_visual_ = 0;  // v0: rows before it never go
  int64_t range_ =
      0;  // rows from the first to the last visual one, text between included; shrinks with them
  int64_t visual_ = 0;  // visual rows now
  int64_t visual_at_start_ = 0;
  bool merge_done_ = false;
  bool prune_done_ = false;
  std::vector<double> shares_;
  std::vector<int32_t> slots_;  // of the rows now
  ReductionReport report_;
  double visual_sum_ = 0.0;  // visual rows after each of the first `layers_` calls, summed

  // Scratch, one entry per row, kept between calls.
  std::vector<int32_t> last_;  // per slot: its last row so far
  std::vector<int32_t> prev_;  // previous row of the same slot, -1: none
  std::vector<float> similar_;
  std::vector<uint8_t> merges_;  // row joins prev_
  std::vector<int32_t> order_;
};

}  // namespace fq::reduction
