// The budget function of FrameFusion (arXiv 2501.01986; the formula is that of the published
// reference): which share of the visual rows present now has to go, so that their average over the
// layers meets `cost`. Pure, any thread.
#pragma once

#include <cstdint>
#include <span>

namespace fq::reduction {

struct Budget {
  enum class Outcome : uint8_t {
    kBound,      // `bound` holds
    kExhausted,  // the calls so far already cost more than the budget
    kTooDeep,    // as many calls as the formula has layers: there is nothing left to plan
  };
  Outcome outcome = Outcome::kBound;
  double bound = 0.0;  // in [0, 1]
};

// `shares[i]` is the share of the visual rows present that call i merged, `cost` the budget in (0,
// 1], `layers` the depth N of the formula. With s_i = prod_{j<=i} (1 - shares[j]), s the last of
// them and n = size of shares:
//   bound = 1 - (N * cost - sum s_i) / ((N - n) * s), at least 0.
Budget plan_budget(std::span<const double> shares, double cost, int layers);

// Rows of a range of `rows` that stay when the share `bound` of it is pruned: rounded half to even.
int64_t prune_keep_count(int64_t rows, double bound);

// Pairs to merge when the share `bound` of `rows` visual rows meets the budget: rounded down.
int64_t budget_merge_count(int64_t rows, double bound);

}  // namespace fq::reduction
