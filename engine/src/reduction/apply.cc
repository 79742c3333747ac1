// Carries out what any stage decided: averages, then moves rows down.

#include <cstring>
#include <vector>

#include "src/reduction/stage.h"

namespace fq::reduction {
namespace {

// Adds every row that goes to the row it joins, in row order, then divides each sum by its number
// of members. A root is never a member, so all sums are of the values the call came with.
void average_groups(const std::vector<int32_t>& root, float* x, int64_t stride, int64_t rows,
                    int64_t width) {
  std::vector<int32_t> members(static_cast<size_t>(rows), 1);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t to = root[row];
    if (to == row) continue;
    ++members[to];
    float* sum = x + to * stride;
    const float* from = x + row * stride;
    for (int64_t d = 0; d < width; ++d) sum[d] += from[d];
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (members[row] == 1) continue;
    const auto count = static_cast<float>(members[row]);
    float* sum = x + row * stride;
    for (int64_t d = 0; d < width; ++d) sum[d] /= count;
  }
}

}  // namespace

int64_t apply_plan(const RowPlan& plan, float* x, int64_t stride, int64_t rows, int64_t width,
                   std::span<int32_t*> columns) {
  if (plan.unchanged || plan.keep.empty()) return rows;
  if (!plan.root.empty()) average_groups(plan.root, x, stride, rows, width);
  const auto kept = static_cast<int64_t>(plan.keep.size());
  for (int64_t to = 0; to < kept; ++to) {
    const int64_t from = plan.keep[to];  // >= to: nothing is overwritten before it was moved
    if (from == to) continue;
    std::memcpy(x + to * stride, x + from * stride, static_cast<size_t>(width) * sizeof(float));
    for (int32_t* column : columns) column[to] = column[from];
  }
  return kept;
}

}  // namespace fq::reduction
