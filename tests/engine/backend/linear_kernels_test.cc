// Linear kernels of every SIMD target against the scalar reference.
#include "tests/engine/backend/linear_problem.h"

namespace fq::backend {
namespace {

using model::WeightFormat;
using Kind = WeightFormat::Kind;

struct Case {
  std::string target;
  WeightFormat format;
};

std::string case_name(const testing::TestParamInfo<Case>& info) {
  const WeightFormat& f = info.param.format;
  std::string name = info.param.target + "_";
  if (f.kind == Kind::kF32) return name + "f32";
  if (f.kind == Kind::kBF16) return name + "bf16";
  return name + "w" + std::to_string(f.bits) + "g" + std::to_string(f.group) +
         (f.symmetric ? "sym"
          : f.offset  ? "offset"
                      : "") +
         (f.scale == DType::kF32 ? "_f32scale"
          : f.stepped()          ? "_i8scale"
                                 : "");
}

std::vector<Case> cases() {
  std::vector<WeightFormat> formats = {{.kind = Kind::kF32}, {.kind = Kind::kBF16}};
  for (const WeightFormat& format : affine_formats()) formats.push_back(format);
  std::vector<Case> all;
  for (const std::string& target : simd_target_names()) {
    for (const WeightFormat& format : formats) all.push_back({target, format});
  }
  return all;
}

class LinearKernels : public testing::TestWithParam<Case> {
 protected:
  LinearFn kernel() const {
    const auto backend = backend_of(GetParam().target);
    const auto fn = backend->linear(GetParam().format, {});
    EXPECT_TRUE(fn);
    return *fn;
  }
};

TEST_P(LinearKernels, EqualTheReferenceForOddShapes) {
  const std::pair<int, int> shapes[] = {{1, 1},   {5, 3},    {16, 32},  {17, 33},
                                        {24, 70}, {40, 129}, {71, 300}, {130, 257}};
  const LinearFn fn = kernel();
  for (const auto& [out, in] : shapes) {
    for (const int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 13, 33}) {
      const bool with_bias = rows % 2 == 1;
      const bool accumulate = rows % 3 == 0;
      SCOPED_TRACE(testing::Message() << "out " << out << " in " << in << " rows " << rows);
      const Problem problem(GetParam().format, out, in, rows, with_bias, accumulate);
      const std::vector<float> want = problem.reference();
      const std::vector<float> got = problem.run(fn, 2);
      if (has_fma(GetParam().target)) {
        EXPECT_SAME_BITS(got, want);
      } else {
        problem.expect_near(got, want);
      }
      if (HasFailure()) return;
    }
  }
}

TEST_P(LinearKernels, ValueOfARowDoesNotDependOnTheOthersNorOnThreads) {
  // More rows than a block, more inputs than a panel, more outputs than an item; a stride that
  // fills few cache sets.
  const int64_t rows = 201;
  const int in = 1024 - static_cast<int>(Problem::kMargin), out = 150;
  const Problem problem(GetParam().format, out, in, rows, true, false);
  const LinearFn fn = kernel();
  const std::vector<float> together = problem.run(fn, 3);
  const std::vector<float> alone = problem.run(fn, 1);
  EXPECT_SAME_BITS(alone, together);
  ThreadPool pool(1);
  std::vector<float> pieces = problem.fresh_output();
  int64_t begin = 0;
  for (const int64_t count : {1, 2, 3, 4, 5, 6, 8, 11, 24, 50, 87}) {
    ops::LinearArgs part = problem.args;
    part.x += begin * part.x_stride;
    part.y = pieces.data() + begin * part.y_stride;
    part.rows = count;
    fn(part, pool);
    begin += count;
  }
  ASSERT_EQ(begin, rows);
  EXPECT_SAME_BITS(pieces, together);
}

TEST_P(LinearKernels, NoRowsIsNothing) {
  const Problem problem(GetParam().format, 20, 40, 0, true, false);
  EXPECT_TRUE(problem.run(kernel(), 2).empty());
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(LinearKernels);  // a machine without SIMD
INSTANTIATE_TEST_SUITE_P(Targets, LinearKernels, testing::ValuesIn(cases()), case_name);

}  // namespace
}  // namespace fq::backend
