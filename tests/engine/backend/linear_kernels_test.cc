// Linear kernels of every SIMD target against the scalar reference.
#include "src/quant/affine_weights.h"
#include "tests/engine/backend/kernel_testing.h"

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
         (f.symmetric ? "sym" : "") + (f.scale == DType::kF32 ? "_f32scale" : "");
}

std::vector<Case> cases() {
  std::vector<WeightFormat> formats = {{.kind = Kind::kF32}, {.kind = Kind::kBF16}};
  for (const int bits : {4, 8}) {
    formats.push_back({.kind = Kind::kAffine,
                       .bits = bits,
                       .group = 128,
                       .symmetric = false,
                       .scale = DType::kF16});
    formats.push_back({.kind = Kind::kAffine,
                       .bits = bits,
                       .group = 64,
                       .symmetric = true,
                       .scale = DType::kF32});
    formats.push_back({.kind = Kind::kAffine,
                       .bits = bits,
                       .group = 32,
                       .symmetric = false,
                       .scale = DType::kF32});
    formats.push_back(
        {.kind = Kind::kAffine, .bits = bits, .group = 0, .symmetric = true, .scale = DType::kF16});
  }
  std::vector<Case> all;
  for (const std::string& target : simd_target_names()) {
    for (const WeightFormat& format : formats) all.push_back({target, format});
  }
  return all;
}

// One linear with its inputs; outputs sit in wider rows whose margin must not be touched.
struct Problem {
  static constexpr int64_t kMargin = 3;
  static constexpr float kSentinel = 12345.0f;

  int out, in;
  int64_t rows;
  std::vector<float> weights, bias, x, y;
  quant::PackedLinear packed;
  ops::LinearArgs args;

  Problem(const WeightFormat& format, int out_, int in_, int64_t rows_, bool with_bias,
          bool accumulate)
      : out(out_), in(in_), rows(rows_) {
    const uint32_t seed = static_cast<uint32_t>(out * 131 + in);
    weights = stress_values(static_cast<size_t>(out) * in, seed);
    bias = normal_values(static_cast<size_t>(out), seed + 1);
    x = stress_values(static_cast<size_t>(rows * (in + kMargin)), seed + 2);
    auto result =
        quant::pack_linear(weights.data(), out, in, format, quant::AffineRange::kIncludeZero);
    EXPECT_TRUE(result);
    packed = std::move(*result);
    if (with_bias) packed.view.bias = bias.data();
    args = {.x = x.data(),
            .x_stride = in + kMargin,
            .rows = rows,
            .w = &packed.view,
            .y = nullptr,
            .y_stride = out + kMargin,
            .accumulate = accumulate};
  }

  std::vector<float> fresh_output() const {
    std::vector<float> values = normal_values(static_cast<size_t>(rows * (out + kMargin)), 99);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t m = 0; m < kMargin; ++m)
        values[static_cast<size_t>(r * (out + kMargin) + out + m)] = kSentinel;
    }
    return values;
  }

  std::vector<float> reference() const {
    std::vector<float> values = fresh_output();
    ops::LinearArgs a = args;
    a.y = values.data();
    ops::linear_reference(a);
    return values;
  }

  std::vector<float> run(LinearFn kernel, int threads) const {
    std::vector<float> values = fresh_output();
    ops::LinearArgs a = args;
    a.y = values.data();
    ThreadPool pool(threads);
    kernel(a, pool);
    return values;
  }

  // Two sums of n products, each rounded at most twice per term, differ by at most 2 (2n + 2) u sum
  // |x w|; bias and old value add their own rounding.
  void expect_near(const std::vector<float>& got, const std::vector<float>& want) const {
    std::vector<float> row(static_cast<size_t>(in));
    for (int o = 0; o < out; ++o) {
      quant::dequantize_row(packed.view, o, row.data());
      for (int64_t r = 0; r < rows; ++r) {
        double size = 20.0;
        for (int i = 0; i < in; ++i) {
          size += std::fabs(double{row[static_cast<size_t>(i)]} *
                            x[static_cast<size_t>(r * (in + kMargin) + i)]);
        }
        const size_t at = static_cast<size_t>(r * (out + kMargin) + o);
        ASSERT_NEAR(got[at], want[at], (4.0 * in + 8.0) * kUnit * size)
            << "row " << r << " output " << o;
      }
    }
  }
};

class LinearKernels : public testing::TestWithParam<Case> {
 protected:
  LinearFn kernel() const {
    const auto backend = backend_of(GetParam().target);
    const auto fn = backend->linear(GetParam().format);
    EXPECT_TRUE(fn);
    return *fn;
  }
};

TEST_P(LinearKernels, EqualTheReferenceForOddShapes) {
  const std::pair<int, int> shapes[] = {{1, 1},   {5, 3},    {16, 32},  {17, 33},
                                        {24, 70}, {40, 129}, {71, 300}, {130, 257}};
  const LinearFn fn = kernel();
  for (const auto& [out, in] : shapes) {
    for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 33}) {
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
