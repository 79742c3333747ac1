#include "src/reduction/framefusion/framefusion.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace fq::reduction {
namespace {

constexpr float kNoSimilarity =
    -2.0f;  // below every cosine: no predecessor, or no defined angle to it

void leave_all(RowPlan* plan) {
  plan->unchanged = true;
  plan->keep.clear();
  plan->root.clear();
}

// Puts the `count` entries of `rows` with the largest value first (ties: lower row), in no order
// among themselves. Linear time: which rows win matters, not their rank. A value that is not a
// number loses against every number.
void select_largest(std::vector<int32_t>* rows, int64_t count, const float* value) {
  if (count <= 0 || count >= static_cast<int64_t>(rows->size())) return;
  std::nth_element(rows->begin(), rows->begin() + count, rows->end(),
                   [value](int32_t a, int32_t b) {
                     const bool a_nan = std::isnan(value[a]), b_nan = std::isnan(value[b]);
                     if (a_nan != b_nan) return b_nan;
                     if (!a_nan && value[a] != value[b]) return value[a] > value[b];
                     return a < b;
                   });
}

}  // namespace

FrameFusion::FrameFusion(const FrameFusionOptions& options, const PromptLayout& layout,
                         backend::SimilarityFn similarity)
    : options_(options),
      similarity_(similarity),
      layers_(layout.layers),
      budget_layers_(options.budget_layers > 0 ? options.budget_layers : layout.layers),
      slots_(layout.slots.begin(), layout.slots.end()),
      last_(static_cast<size_t>(layout.period)) {
  const auto is_visual = [](int32_t slot) { return slot >= 0; };
  const auto first = std::find_if(slots_.begin(), slots_.end(), is_visual);
  const auto last = std::find_if(slots_.rbegin(), slots_.rend(), is_visual).base();
  first_visual_ = first - slots_.begin();
  range_ = last - first;
  visual_ = visual_at_start_ = std::count_if(slots_.begin(), slots_.end(), is_visual);
  report_.stage = "framefusion";
  // One entry per hook call of a whole prefill: no allocation later.
  report_.calls.reserve(static_cast<size_t>(layers_) + 1);
  shares_.reserve(static_cast<size_t>(layers_) + 1);
}

int FrameFusion::importance_queries(int) const {
  return merge_done_ && !prune_done_ ? options_.importance_queries : 0;
}

void FrameFusion::decide(const StageInput& input, RowPlan* plan, ThreadPool& pool) {
  leave_all(plan);
  if (input.rows <= 1) return;  // decode, or nothing to compare: not a call of the prompt
  ReductionCall call;
  call.call = input.call;
  call.rows_in = static_cast<int>(input.rows);
  call.visual_in = static_cast<int>(visual_);
  call.branch = "noop";
  if (prune_done_) {
    // Nothing changes any more.
  } else if (input.rows != static_cast<int64_t>(slots_.size())) {
    miss_budget(&call);  // not the rows that this stage follows: it cannot tell which are visual
  } else if (!merge_done_) {
    merge(input, plan, &call, pool);
  } else if (input.importance != nullptr) {
    prune(input, plan, &call);
  }
  call.rows_out = plan->unchanged ? call.rows_in : static_cast<int>(plan->keep.size());
  if (!plan->unchanged) {
    range_ -= input.rows - call.rows_out;
    compact_slots(*plan);
  }
  record(std::move(call));
}

void FrameFusion::merge(const StageInput& input, RowPlan* plan, ReductionCall* call,
                        ThreadPool& pool) {
  const Budget budget = plan_budget(shares_, options_.cost, budget_layers_);
  if (budget.outcome != Budget::Outcome::kBound) return miss_budget(call);
  call->bound = budget.bound;

  link_predecessors();
  similar_.resize(slots_.size());
  similarity_({.x = input.x,
               .stride = input.stride,
               .rows = input.rows,
               .width = input.width,
               .prev = prev_.data(),
               .out = similar_.data()},
              pool);
  if (input.call == 0) report_.median_first_similarity = median_similarity();

  merges_.assign(slots_.size(), 0);
  int64_t merged = 0;
  for (size_t i = 0; i < slots_.size(); ++i) {
    // A bound below every cosine does not make pairs of what has no cosine. False for a NaN.
    if (similar_[i] > kNoSimilarity && similar_[i] >= options_.similarity_lower_bound) {
      merges_[i] = 1;
      ++merged;
    }
  }
  const double share = static_cast<double>(merged) / static_cast<double>(visual_);
  if (share < budget.bound) {
    shares_.push_back(share);
    // These merges still happen; a small share says that the next ones would be fewer.
    merge_done_ = share < options_.ratio_lower_bound;
    call->branch = merge_done_ ? "merge_and_stop" : "merge_continue";
  } else {
    merged = std::min(merged, budget_merge_count(visual_, budget.bound));
    select_most_similar(merged);
    end_both_phases();
    call->branch = "budget_topk";
  }
  call->merged = static_cast<int>(merged);
  call->share = static_cast<double>(merged) / static_cast<double>(visual_);
  if (merged > 0) write_merge_plan(plan, merged);
}

void FrameFusion::prune(const StageInput& input, RowPlan* plan, ReductionCall* call) {
  const Budget budget = plan_budget(shares_, options_.cost, budget_layers_);
  if (budget.outcome != Budget::Outcome::kBound) return miss_budget(call);
  call->bound = budget.bound;
  call->branch = "prune";
  end_both_phases();

  // The range is contiguous: rows that merging removed all lay inside it.
  const int64_t end = first_visual_ + range_;
  order_.clear();
  for (int64_t row = first_visual_; row < end; ++row) {
    if (options_.prune_text || slots_[row] >= 0) order_.push_back(static_cast<int32_t>(row));
  }
  const auto candidates = static_cast<int64_t>(order_.size());
  int64_t kept = prune_keep_count(candidates, budget.bound);
  // A sequence cannot be left without rows: there would be none to continue from.
  if (candidates == input.rows) kept = std::max<int64_t>(kept, 1);
  if (kept >= candidates) return;
  select_largest(&order_, kept, input.importance);
  merges_.assign(slots_.size(), 0);  // here: the row goes
  for (int64_t i = kept; i < candidates; ++i) merges_[order_[i]] = 1;
  plan->unchanged = false;
  for (int64_t row = 0; row < input.rows; ++row) {
    if (!merges_[row]) plan->keep.push_back(static_cast<int32_t>(row));
  }
}

void FrameFusion::miss_budget(ReductionCall* call) {
  call->branch = "budget_missed";
  report_.budget_missed = true;
  end_both_phases();
}

void FrameFusion::end_both_phases() { merge_done_ = prune_done_ = true; }

void FrameFusion::link_predecessors() {
  std::fill(last_.begin(), last_.end(), -1);
  prev_.resize(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i] < 0) {
      prev_[i] = -1;
    } else {
      prev_[i] = std::exchange(last_[slots_[i]], static_cast<int32_t>(i));
    }
  }
}

void FrameFusion::select_most_similar(int64_t count) {
  order_.clear();
  for (size_t i = 0; i < merges_.size(); ++i) {
    if (merges_[i]) order_.push_back(static_cast<int32_t>(i));
  }
  select_largest(&order_, count, similar_.data());
  for (size_t i = static_cast<size_t>(count); i < order_.size(); ++i) merges_[order_[i]] = 0;
}

void FrameFusion::write_merge_plan(RowPlan* plan, int64_t merged) const {
  plan->unchanged = false;
  plan->keep.reserve(slots_.size() - static_cast<size_t>(merged));
  plan->root.resize(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto row = static_cast<int32_t>(i);
    // prev_[i] < i, so its root is known already.
    plan->root[i] = merges_[i] ? plan->root[prev_[i]] : row;
    if (!merges_[i]) plan->keep.push_back(row);
  }
}

void FrameFusion::compact_slots(const RowPlan& plan) {
  for (size_t i = 0; i < plan.keep.size(); ++i) slots_[i] = slots_[plan.keep[i]];
  slots_.resize(plan.keep.size());
  visual_ = std::count_if(slots_.begin(), slots_.end(), [](int32_t slot) { return slot >= 0; });
}

void FrameFusion::record(ReductionCall call) {
  // Attention of layer i works on what call i left; the last call's outcome only reaches the last
  // MLP.
  const int index = call.call;
  if (index < layers_) {
    visual_sum_ += static_cast<double>(visual_);
    const double rest = static_cast<double>(layers_ - 1 - index) * static_cast<double>(visual_);
    report_.mean_kept_share = (visual_sum_ + rest) / (static_cast<double>(layers_) *
                                                      static_cast<double>(visual_at_start_));
  } else if (!prune_done_) {
    // Merging went on to the last layer, so the pruning that meets the budget never came.
    end_both_phases();
    const double rounding = 0.5 / static_cast<double>(visual_at_start_);
    report_.budget_missed |= report_.mean_kept_share > options_.cost + rounding;
  }
  report_.calls.push_back(std::move(call));
}

double FrameFusion::median_similarity() {
  std::vector<float> values;
  values.reserve(similar_.size());
  for (float s : similar_) {
    if (s > kNoSimilarity) values.push_back(s);
  }
  if (values.empty()) return 0.0;
  const size_t middle = values.size() / 2;
  std::nth_element(values.begin(), values.begin() + middle, values.end());
  const double upper = values[middle];
  if (values.size() % 2 == 1) return upper;
  return 0.5 * (upper + *std::max_element(values.begin(), values.begin() + middle));
}

}  // namespace fq::reduction
