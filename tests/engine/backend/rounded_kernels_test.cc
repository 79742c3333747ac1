// Linears whose inputs are rounded to bfloat16: the rounding itself, the reference against real
// arithmetic on the rounded values, and the kernels of every SIMD target against the reference.
#include <bit>

#include "src/quant/activations.h"
#include "src/quant/number.h"
#include "tests/engine/backend/linear_problem.h"

namespace fq::backend {
namespace {

using model::ActivationFormat;
using model::WeightFormat;
using Kind = WeightFormat::Kind;

constexpr ActivationFormat kRounded{.bf16 = true};
// Kernels may take subnormal bfloat16 numbers and float32 sums for zeros.
constexpr double kSmallestNormal = 0x1p-126;

struct Case {
  std::string target;
  WeightFormat weights;
};

std::string case_name(const testing::TestParamInfo<Case>& info) {
  std::string name = info.param.target + "_" + info.param.weights.name();
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

std::vector<WeightFormat> weight_formats() {
  std::vector<WeightFormat> formats = {{.kind = Kind::kBF16}};
  for (const WeightFormat& format : affine_formats()) formats.push_back(format);
  // Groups of 16 normal values: some zeros are near the ends of a byte, and code - zero far from 0.
  formats.push_back({.kind = Kind::kAffine, .bits = 8, .group = 16});
  return formats;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const std::string& target : simd_target_names()) {
    for (const WeightFormat& weights : weight_formats()) all.push_back({target, weights});
  }
  return all;
}

// Weights of one output as the kernels multiply them, in double.
struct Factors {
  std::vector<double> factor, scale, offset;  // weight = factor * scale + offset
  Factors(const quant::LinearWeights& w, int o) {
    for (int i = 0; i < w.in; ++i) {
      if (w.format.kind != Kind::kAffine) {
        add(quant::weight_at(w, o, i), 1, 0);
        continue;
      }
      const int group = i / w.group;
      const int zero = w.offsets != nullptr ? 0 : quant::weight_zero(w, o, group);
      add(quant::weight_code_at(w, o, i) - zero, quant::group_scale(w, o, group),
          w.offsets != nullptr ? quant::group_offset(w, o, group) : 0);
    }
  }
  void add(double f, double s, double b) {
    factor.push_back(f);
    scale.push_back(s);
    offset.push_back(b);
  }
};

// The sum over the rounded inputs in double, and how far from it float32 sums of the same terms may
// be, in whatever order they are added: a rounding of at most kUnit times the sum of magnitudes for
// each of `in` additions (products of numbers of 8 bits are exact) and for scaling, in the float32
// kernels two more for each weight. Subnormal numbers may count as zeros, which is an absolute
// error: of an input, of a weight, or of the sum after each addition.
struct Expected {
  double value = 0, tolerance = 0;
};
Expected expected(const Factors& w, const float* x) {
  Expected e;
  double size = 0, flushed = 0;
  for (size_t i = 0; i < w.factor.size(); ++i) {
    const double value = quant::float_from_bf16(quant::bf16_from_float(x[i]));
    e.value += value * (w.factor[i] * w.scale[i] + w.offset[i]);
    size += std::fabs(value) * (std::fabs(w.factor[i] * w.scale[i]) + std::fabs(w.offset[i]));
    flushed +=
        (1 + std::fabs(value) + std::fabs(w.factor[i])) * (w.scale[i] + std::fabs(w.offset[i]));
  }
  const double terms = static_cast<double>(w.factor.size());
  e.tolerance = (2 * terms + 16) * kUnit * size + 2 * kSmallestNormal * (flushed + terms);
  return e;
}

// Within that bound of the sum of real numbers.
void expect_sums(const Problem& problem, const std::vector<float>& got) {
  for (int o = 0; o < problem.out; ++o) {
    const Factors factors(problem.packed.view, o);
    for (int64_t r = 0; r < problem.rows; ++r) {
      const Expected e = expected(factors, problem.args.x + r * problem.args.x_stride);
      ASSERT_NEAR(got[static_cast<size_t>(r * problem.args.y_stride + o)], e.value, e.tolerance)
          << "row " << r << " output " << o;
    }
  }
}

// Each within the bound, and rounded once more for each number that was added to the sum.
void expect_near(const Problem& problem, const std::vector<float>& got,
                 const std::vector<float>& want) {
  for (int o = 0; o < problem.out; ++o) {
    const Factors factors(problem.packed.view, o);
    for (int64_t r = 0; r < problem.rows; ++r) {
      const size_t at = static_cast<size_t>(r * problem.args.y_stride + o);
      const Expected e = expected(factors, problem.args.x + r * problem.args.x_stride);
      const double added = 4 * kUnit * (std::fabs(e.value) + 20.0);
      ASSERT_NEAR(got[at], want[at], 2 * e.tolerance + added) << "row " << r << " output " << o;
    }
  }
}

class RoundedKernels : public testing::TestWithParam<Case> {
 protected:
  LinearFn kernel() const {
    const auto fn = backend_of(GetParam().target)->linear(GetParam().weights, kRounded);
    EXPECT_TRUE(fn);
    return *fn;
  }
};

TEST_P(RoundedKernels, AreNearTheReferenceForOddShapes) {
  const std::pair<int, int> shapes[] = {{1, 1},   {17, 1},   {5, 3},    {16, 31},
                                        {17, 33}, {33, 100}, {1, 4304}, {90, 777}};
  const LinearFn fn = kernel();
  for (const auto& [out, in] : shapes) {
    for (int64_t rows = 1; rows <= 40; rows += in > 1000 ? 13 : rows < 14 ? 1 : 13) {
      SCOPED_TRACE(testing::Message() << "out " << out << " in " << in << " rows " << rows);
      const Problem problem(GetParam().weights, out, in, rows, rows % 2 == 1, rows % 3 == 0,
                            kRounded);
      expect_near(problem, problem.run(fn, 2), problem.reference());
      if (HasFailure()) return;
    }
  }
}

TEST_P(RoundedKernels, ValueOfARowDoesNotDependOnTheOthersNorOnThreads) {
  const int64_t rows = 201;
  const int in = 1101, out = 150;
  const Problem problem(GetParam().weights, out, in, rows, true, false, kRounded);
  const LinearFn fn = kernel();
  const std::vector<float> together = problem.run(fn, 3);
  EXPECT_SAME_BITS(problem.run(fn, 1), together);
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

// Every input is rounded as the hand-written table below says, on every target: with a weight of 1
// the output is the rounded input.
TEST_P(RoundedKernels, RoundInputsToNearestEven) {
  if (GetParam().weights.kind != Kind::kBF16) return;
  std::vector<float> weights(16 * 40, 0.0f);
  for (int o = 0; o < 16; ++o) weights[static_cast<size_t>(o * 40 + o)] = 1.0f;
  const auto packed = quant::pack_linear(weights.data(), 16, 40, GetParam().weights,
                                         quant::AffineRange::kReference);
  ASSERT_TRUE(packed);
  const uint32_t table[][2] = {{0x3F800000, 0x3F800000},   // 1
                               {0x3F807FFF, 0x3F800000},   // below the middle
                               {0x3F808000, 0x3F800000},   // a tie: even is below
                               {0x3F808001, 0x3F810000},   // above the middle
                               {0x3F818000, 0x3F820000},   // a tie: even is above
                               {0xBF818000, 0xBF820000},   // likewise, negative
                               {0x3FFFFFFF, 0x40000000},   // carries into the exponent
                               {0x7F7F7FFF, 0x7F7F0000},   // the greatest that stays finite
                               {0x00800000, 0x00800000}};  // the least normal number
  std::vector<float> x, y(40 * 16);
  for (int64_t rows : {1, 3, 40}) {
    x.assign(static_cast<size_t>(rows) * 40, 0.0f);
    for (size_t i = 0; i < std::size(table); ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        x[static_cast<size_t>(r) * 40 + i] = std::bit_cast<float>(table[i][0]);
      }
    }
    ThreadPool pool(1);
    kernel()({.x = x.data(),
              .x_stride = 40,
              .rows = rows,
              .w = &packed->view,
              .y = y.data(),
              .y_stride = 16,
              .activations = kRounded},
             pool);
    for (int64_t r = 0; r < rows; ++r) {
      for (size_t i = 0; i < std::size(table); ++i) {
        EXPECT_EQ(std::bit_cast<uint32_t>(y[static_cast<size_t>(r) * 16 + i]), table[i][1])
            << "row " << r << " number " << i;
      }
    }
  }
}

TEST_P(RoundedKernels, ARowThatIsNotFiniteStaysAlone) {
  const LinearFn fn = kernel();
  for (const int64_t rows : {8, 12}) {
    Problem problem(GetParam().weights, 33, 70, rows, false, false, kRounded);
    problem.x[static_cast<size_t>(3 * problem.args.x_stride + 69)] =
        std::numeric_limits<float>::quiet_NaN();
    // Rounds to infinity.
    problem.x[static_cast<size_t>(7 * problem.args.x_stride)] = 3.4e38f;
    const std::vector<float> got = problem.run(fn, 1);
    for (int64_t r = 0; r < rows; ++r) {
      int odd = 0;
      for (int o = 0; o < 33; ++o)
        odd += !std::isfinite(got[static_cast<size_t>(r * problem.args.y_stride + o)]);
      // A weight of zero times infinity is NaN, so all are odd.
      EXPECT_EQ(odd, r == 3 || r == 7 ? 33 : 0) << "row " << r;
    }
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(RoundedKernels);  // a machine without SIMD
INSTANTIATE_TEST_SUITE_P(Targets, RoundedKernels, testing::ValuesIn(cases()), case_name);

// --- The reference itself ---------------------------------------------------------------------

TEST(RoundRow, RoundsToNearestEvenAndKeepsWhatIsNotFinite) {
  const uint32_t table[][2] = {
      {0x00000000, 0x00000000}, {0x80000000, 0x80000000},  // zeros keep their sign
      {0x3F808000, 0x3F800000}, {0x3F818000, 0x3F820000},  // ties
      {0x3F808001, 0x3F810000}, {0xBF808001, 0xBF810000},
      {0x7F7F8000, 0x7F800000},                            // a tie that becomes infinity
      {0x7F800000, 0x7F800000}, {0xFF800000, 0xFF800000},  // infinities
      {0x00008000, 0x00000000}, {0x00018000, 0x00020000},  // subnormal ties
      {0x00000001, 0x00000000}, {0x007FFFFF, 0x00800000}};
  for (const auto& [from, to] : table) {
    float y = 0;
    const float x = std::bit_cast<float>(from);
    quant::round_row(&x, 1, &y);
    EXPECT_EQ(std::bit_cast<uint32_t>(y), to) << std::hex << from;
  }
  for (const uint32_t nan : {0x7FC00000u, 0x7F800001u, 0xFFFFFFFFu}) {
    float y = std::bit_cast<float>(nan);
    quant::round_row(&y, 1, &y);
    EXPECT_TRUE(std::isnan(y)) << std::hex << nan;
  }
}

TEST(RoundedReference, EqualsRealArithmeticOnTheRoundedInputs) {
  for (const WeightFormat& weights : weight_formats()) {
    SCOPED_TRACE(weights.name());
    const Problem problem(weights, 9, 700, 3, false, false, kRounded);
    expect_sums(problem, problem.reference());
  }
}

// What a bfloat16 number has to hold is code - zero, at most 255 either way: 8 significant bits.
TEST(RoundedReference, DifferencesOfCodesAreExactInBfloat16) {
  for (int difference = -255; difference <= 255; ++difference) {
    const float value = static_cast<float>(difference);
    EXPECT_EQ(quant::float_from_bf16(quant::bf16_from_float(value)), value);
  }
}

}  // namespace
}  // namespace fq::backend
