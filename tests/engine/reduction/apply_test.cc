// apply_plan carries out any plan: averages in float32, rows moved in place, per-row columns along
// with them.

#include <limits>

#include "tests/engine/reduction/helpers.h"

namespace fq::reduction::test {
namespace {

TEST(ApplyPlan, UnchangedTouchesNothing) {
  std::vector<float> x = {1, 2, 3, 4};
  const std::vector<float> before = x;
  std::vector<int32_t> column = {5, 6};
  std::vector<int32_t*> columns = {column.data()};
  EXPECT_EQ(apply_plan({}, x.data(), 2, 2, 2, columns), 2);
  EXPECT_EQ(x, before);
  EXPECT_EQ(column, (std::vector<int32_t>{5, 6}));
}

TEST(ApplyPlan, AveragesGroupsThenCompacts) {
  // Rows 1, 3 and 4 join row 0; row 2 stays alone.
  std::vector<float> x = {1, 10, 2, 20, 7, 70, 3, 30, 6, 60};
  std::vector<int32_t> a = {0, 1, 2, 3, 4}, b = {9, 8, 7, 6, 5};
  std::vector<int32_t*> columns = {a.data(), b.data()};
  const RowPlan plan{false, {0, 2}, {0, 0, 2, 0, 0}};
  EXPECT_EQ(apply_plan(plan, x.data(), 2, 5, 2, columns), 2);
  EXPECT_EQ(std::vector<float>(x.begin(), x.begin() + 4), (std::vector<float>{3, 30, 7, 70}));
  EXPECT_EQ(std::vector<int32_t>(a.begin(), a.begin() + 2), (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(std::vector<int32_t>(b.begin(), b.begin() + 2), (std::vector<int32_t>{9, 7}));
}

TEST(ApplyPlan, DropsWithoutAveragingWhenThereAreNoRoots) {
  std::vector<float> x = {1, 2, 3, 4, 5};
  EXPECT_EQ(apply_plan({false, {1, 4}, {}}, x.data(), 1, 5, 1, {}), 2);
  EXPECT_EQ(x[0], 2.0f);
  EXPECT_EQ(x[1], 5.0f);
}

TEST(ApplyPlan, LeavesWhatLiesBetweenTheRows) {
  std::vector<float> x = {1, -1, 2, -2, 3, -3};  // width 1, stride 2
  EXPECT_EQ(apply_plan({false, {0, 2}, {0, 0, 2}}, x.data(), 2, 3, 1, {}), 2);
  EXPECT_EQ(x, (std::vector<float>{1.5f, -1, 3, -2, 3, -3}));
}

TEST(ApplyPlan, LongGroupsAreExactWhereFloat32Is) {
  // 4097 rows whose sum needs 24 bits: lower precision or a count in float16 would miss it.
  const int n = 4097;
  std::vector<float> x(n, 1.0f);
  RowPlan plan{false, {0}, std::vector<int32_t>(n, 0)};
  EXPECT_EQ(apply_plan(plan, x.data(), 1, n, 1, {}), 1);
  EXPECT_EQ(x[0], 1.0f);
}

}  // namespace
}  // namespace fq::reduction::test
