#include "src/reduction/framefusion/budget.h"

#include <cmath>

namespace fq::reduction {
namespace {

// Half to even, whatever rounding mode the process runs in.
double round_half_even(double x) {
  const double down = std::floor(x);
  const double rest = x - down;
  if (rest != 0.5) return rest < 0.5 ? down : down + 1.0;
  return std::fmod(down, 2.0) == 0.0 ? down : down + 1.0;
}

}  // namespace

Budget plan_budget(std::span<const double> shares, double cost, int layers) {
  const auto calls = static_cast<int64_t>(shares.size());
  // Before the formula: at n = N it divides by zero, beyond it the sign flips.
  if (calls >= layers) return {Budget::Outcome::kTooDeep, 0.0};
  double spent = 0.0, kept = 1.0;
  for (double share : shares) {
    kept *= 1.0 - share;
    spent += kept;
  }
  const double rest = layers * cost - spent;
  if (rest < 0.0) return {Budget::Outcome::kExhausted, 0.0};
  const double affordable = rest / (static_cast<double>(layers - calls) * kept);
  // Nothing kept (0 / 0) can afford everything.
  if (!(affordable <= 1.0)) return {Budget::Outcome::kBound, 0.0};
  return {Budget::Outcome::kBound, 1.0 - affordable};
}

int64_t prune_keep_count(int64_t rows, double bound) {
  return static_cast<int64_t>(round_half_even(static_cast<double>(rows) * (1.0 - bound)));
}

int64_t budget_merge_count(int64_t rows, double bound) {
  return static_cast<int64_t>(std::floor(bound * static_cast<double>(rows)));
}

}  // namespace fq::reduction
