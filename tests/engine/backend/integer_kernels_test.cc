// Linears with quantized inputs: kernels of every SIMD target against the scalar reference, and the
// reference against real arithmetic on the dequantized values.
#include "src/quant/activations.h"
#include "tests/engine/backend/linear_problem.h"

namespace fq::backend {
namespace {

using model::ActivationFormat;
using model::WeightFormat;

struct Case {
  std::string target;
  WeightFormat weights;
  ActivationFormat activations;
};

std::string plain(std::string name) {
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

std::string case_name(const testing::TestParamInfo<Case>& info) {
  return plain(info.param.target + "_" + info.param.weights.name() + "_" +
               info.param.activations.name());
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const std::string& target : simd_target_names()) {
    int turn = 0;
    for (const WeightFormat& weights : affine_formats()) {
      const ActivationFormat chosen[] = {{8, true}, {4, true}, {8, false}, {8, true}, {6, false}};
      all.push_back({target, weights, chosen[turn++ % 5]});
    }
  }
  return all;
}

// Without a fused multiply-add two or three operations a span are rounded once more, on terms of at
// most |q s scale code| and |z s w|: twice the reference's own bound (below).
void expect_near(const Problem& problem, const std::vector<float>& got,
                 const std::vector<float>& want) {
  const quant::LinearWeights& w = problem.packed.view;
  const int span = std::min(w.group, quant::kIntegerSpan);
  const double spans = (w.in + span - 1) / span;
  std::vector<int8_t> codes(static_cast<size_t>(w.in));
  for (int64_t r = 0; r < problem.rows; ++r) {
    const quant::QuantizedRow row = quant::quantize_row(
        problem.args.x + r * problem.args.x_stride, w.in, problem.args.activations, codes.data());
    for (int o = 0; o < w.out; ++o) {
      double size = 20.0;
      for (int i = 0; i < w.in; ++i) {
        const double scale = quant::group_scale(w, o, i / w.group);
        size +=
            255.0 * row.scale *
            (std::fabs(double{quant::weight_at(w, o, i)}) + scale * quant::weight_code_at(w, o, i));
      }
      const size_t at = static_cast<size_t>(r * problem.args.y_stride + o);
      ASSERT_NEAR(got[at], want[at], (spans + 4) * 8 * kUnit * size)
          << "row " << r << " output " << o;
    }
  }
}

class IntegerKernels : public testing::TestWithParam<Case> {
 protected:
  LinearFn kernel() const {
    const auto backend = backend_of(GetParam().target);
    const auto fn = backend->linear(GetParam().weights, GetParam().activations);
    EXPECT_TRUE(fn);
    return *fn;
  }

  // On `threads` threads; to the bit where the target has a fused multiply-add.
  void expect_reference(const Problem& problem, int threads) const {
    const std::vector<float> want = problem.reference();
    const std::vector<float> got = problem.run(kernel(), threads);
    if (has_fma(GetParam().target)) {
      EXPECT_SAME_BITS(got, want);
    } else {
      expect_near(problem, got, want);
    }
  }
};

TEST_P(IntegerKernels, EqualTheReferenceForOddShapes) {
  const std::pair<int, int> shapes[] = {{1, 1},   {5, 3},    {16, 32},  {17, 33},
                                        {24, 70}, {40, 129}, {90, 1100}};
  for (const auto& [out, in] : shapes) {
    for (const int64_t rows : {1, 2, 4, 5, 8, 9, 12, 13, 33}) {
      SCOPED_TRACE(testing::Message() << "out " << out << " in " << in << " rows " << rows);
      const Problem problem(GetParam().weights, out, in, rows, rows % 2 == 1, rows % 3 == 0,
                            GetParam().activations);
      expect_reference(problem, 2);
      if (HasFailure()) return;
    }
  }
}

TEST_P(IntegerKernels, ValueOfARowDoesNotDependOnTheOthersNorOnThreads) {
  const int64_t rows = 303;  // so many that threads share them, in odd parts
  const int in = 1100, out = 150;
  const Problem problem(GetParam().weights, out, in, rows, true, false, GetParam().activations);
  const LinearFn fn = kernel();
  const std::vector<float> together = problem.run(fn, 3);
  EXPECT_SAME_BITS(problem.run(fn, 1), together);
  ThreadPool pool(1);
  std::vector<float> pieces = problem.fresh_output();
  int64_t begin = 0;
  for (const int64_t count : {1, 2, 3, 4, 5, 6, 8, 11, 24, 50, 87, 102}) {
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

// More rows than a thread takes at once, and not a multiple of what it takes.
TEST_P(IntegerKernels, EqualTheReferenceForManyRows) {
  const Problem problem(GetParam().weights, 20, 70, 1023, true, false, GetParam().activations);
  expect_reference(problem, 1);
}

// The largest sums there can be: every code and every input at an end of its range, over more
// inputs than a span. An accumulator that saturates or wraps cannot pass (plain 8-bit pairs would:
// 2 * 255 * 128 > 32767).
TEST_P(IntegerKernels, ExtremesDoNotSaturate) {
  const int in = 1100, out = 20;
  for (const auto& [sign, rows] : {std::pair{1.0f, 13}, std::pair{-1.0f, 13}, std::pair{1.0f, 4}}) {
    Problem problem(GetParam().weights, out, in, rows, false, false, GetParam().activations);
    // Weights from -w to +w with nearly all at one end use the outermost codes.
    std::vector<float> weights(static_cast<size_t>(out) * in, sign);
    for (size_t i = 0; i < weights.size(); i += 16) weights[i] = -sign;
    auto packed = quant::pack_linear(weights.data(), out, in, GetParam().weights,
                                     quant::AffineRange::kIncludeZero);
    ASSERT_TRUE(packed);
    problem.packed = std::move(*packed);
    problem.args.w = &problem.packed.view;
    std::fill(problem.x.begin(), problem.x.end(), -1.0f);
    for (size_t i = 5; i < problem.x.size(); i += 64) problem.x[i] = 1.0f;
    if (!GetParam().activations.symmetric) problem.set_row_sums();
    expect_reference(problem, 1);
  }
}

// Kernels that add up pairs of products in int16 choose for each block of inputs how long, from
// what the inputs add up to. Rows just inside and just outside of each bound, beside others: of 64
// inputs 34 times the largest 4-bit code are 32640, 35 times are 33600. 16, 32 and 64 inputs of 33,
// 16 and 8 are where 6 bits change, of 66, 33 and 16 where 5 do. With a zero it is the difference
// from it that counts, twice as large here; the codes behind the last input, which are 0, have one
// too (634 inputs leave six of them in a block that is else full).
TEST_P(IntegerKernels, SumsOfPairsLeaveInt16InTime) {
  const int out = 40;
  const int levels[] = {34, 35, 68, 69, 127, 0, 17, 18, 32, 33, 66, 67, 8, 9, 16, 4, 5};
  constexpr int kLevels = std::size(levels);
  struct Shape {
    int in, rows, first;  // level
  };
  for (const auto& [in, rows, first] :
       {Shape{650, 1, 0}, Shape{650, 2, 0}, Shape{650, 4, 0}, Shape{650, 4, 8}, Shape{650, 8, 0},
        Shape{650, 8, 8}, Shape{650, 103, 0}, Shape{634, 103, 0}}) {
    for (const int sign : {1, -1}) {
      Problem problem(GetParam().weights, out, in, rows, false, false, GetParam().activations);
      std::vector<float> weights(static_cast<size_t>(out) * in, 1.0f);  // the largest codes
      // The codes behind the last one are that of 0, which is the least one without this.
      for (int o = 0; in == 634 && o < out; ++o)
        weights[static_cast<size_t>((o + 1) * in - 1)] = -1;
      auto packed = quant::pack_linear(weights.data(), out, in, GetParam().weights,
                                       quant::AffineRange::kIncludeZero);
      ASSERT_TRUE(packed);
      problem.packed = std::move(*packed);
      problem.args.w = &problem.packed.view;
      for (int r = 0; r < rows; ++r) {
        float* const row = problem.x.data() + r * problem.args.x_stride;
        // Six rows of each level, so that there are tiles of one and of two.
        const int level = levels[(first + r / (rows <= 8 ? 1 : 6)) % kLevels];
        std::fill_n(row, in, static_cast<float>(sign * level));
        row[0] = 127.0f;
      }
      if (!GetParam().activations.symmetric) problem.set_row_sums();
      expect_reference(problem, 1);
      if (HasFailure()) return;
    }
  }
}

// Kernels that fold pairs of words count the inputs of a span from a number below them, and treat
// what is too far above it apart (winograd-inl.h). Spans whose inputs reach from every number near
// the least one to every number near the largest, in words that are folded, rows of all kinds side
// by side.
TEST_P(IntegerKernels, InputsOfASpanMayLieFarApart) {
  const int in = 650, rows = 103;
  Problem problem(GetParam().weights, 70, in, rows, false, false, GetParam().activations);
  const ActivationFormat& format = GetParam().activations;
  const int half = 1 << (format.bits - 1), near = std::min(18, half);
  std::mt19937 random(5);
  for (int r = 0, kind = 0; r < rows; ++r) {
    float* const row = problem.x.data() + r * problem.args.x_stride;
    for (int begin = 0; begin < in; begin += 64, ++kind) {
      const int least = -half + kind % near, largest = half - 1 - kind / near % near;
      std::uniform_int_distribution<int> between(least, largest);
      const int often = kind % 7 + 1;  // from every input at an end to few
      for (int i = begin; i < std::min(begin + 64, in); ++i) {
        const int value = i % often == 0 ? (i / often % 2 == 0 ? least : largest) : between(random);
        row[i] = static_cast<float>(value);
      }
    }
    // One step is 1, and codes are the values themselves: the ends are where nothing is folded.
    row[8] = static_cast<float>(half - 1);
    row[9] = static_cast<float>(format.symmetric ? 1 - half : -half);
  }
  if (!format.symmetric) problem.set_row_sums();
  expect_reference(problem, 2);
}

// Kernels multiply by the inverse of a scale where that cannot change a code: here it could.
TEST_P(IntegerKernels, QuotientsNearTiesRoundAsADivisionDoes) {
  const int in = 506, rows = 24;
  Problem problem(GetParam().weights, 17, in, rows, false, false, GetParam().activations);
  const ActivationFormat& format = GetParam().activations;
  const int levels = (1 << format.bits) - 1, half = levels / 2;
  std::mt19937 random(3);
  std::uniform_real_distribution<float> sizes(0.5f, 40.0f);
  for (int r = 0; r < rows; ++r) {
    float* const row = problem.x.data() + r * problem.args.x_stride;
    const float largest = sizes(random);
    const float least = format.symmetric ? -largest : -0.4f * largest;
    const float scale = format.symmetric ? largest / static_cast<float>(half)
                                         : (largest - least) / static_cast<float>(levels);
    for (int i = 0; i < in; ++i) {
      // A tie, and its neighbours up to five numbers away.
      const double tie = (i % (half - 1) + 0.5) * scale * (i % 2 == 0 ? 1 : -0.4);
      float value = static_cast<float>(tie);
      for (int step = 0; step < i % 6; ++step)
        value = std::nextafterf(value, i % 4 < 2 ? largest : least);
      row[i] = std::clamp(value, least, largest);
    }
    row[0] = largest;
    row[1] = least;
  }
  if (!format.symmetric) problem.set_row_sums();
  expect_reference(problem, 1);
}

TEST_P(IntegerKernels, ARowThatIsNotFiniteStaysAlone) {
  Problem problem(GetParam().weights, 33, 70, 12, false, false, GetParam().activations);
  problem.x[static_cast<size_t>(3 * problem.args.x_stride + 69)] =
      std::numeric_limits<float>::quiet_NaN();
  problem.x[static_cast<size_t>(7 * problem.args.x_stride)] =
      std::numeric_limits<float>::infinity();
  problem.args.x = problem.x.data();
  const std::vector<float> got = problem.run(kernel(), 1);
  for (int64_t r = 0; r < 12; ++r) {
    for (int o = 0; o < 33; ++o) {
      const bool finite = std::isfinite(got[static_cast<size_t>(r * problem.args.y_stride + o)]);
      EXPECT_EQ(finite, r != 3 && r != 7) << "row " << r << " output " << o;
    }
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(IntegerKernels);  // a machine without SIMD
INSTANTIATE_TEST_SUITE_P(Targets, IntegerKernels, testing::ValuesIn(cases()), case_name);

// --- The reference itself ---------------------------------------------------------------------

// Sum of (q - z) s_x * w over the dequantized weights, in double: what `exact` mode computes. The
// reference rounds once per operation on terms of at most |q s w| (and |z s w| for the zeros), two
// or three of them a span: a bound of (spans + 4) * 4 roundings of the sum of magnitudes.
TEST(IntegerReference, EqualsRealArithmeticOnTheDequantizedValues) {
  for (const WeightFormat& weights : affine_formats()) {
    for (const ActivationFormat activations :
         {ActivationFormat{8, true}, ActivationFormat{4, true}, ActivationFormat{8, false},
          ActivationFormat{4, false}}) {
      SCOPED_TRACE(weights.name() + " " + activations.name());
      const int out = 9, in = 700;
      const Problem problem(weights, out, in, 3, false, false, activations);
      const std::vector<float> got = problem.reference();
      const int span = std::min(problem.packed.view.group, quant::kIntegerSpan);
      const double spans = (in + span - 1) / span;
      std::vector<int8_t> codes(static_cast<size_t>(in));
      for (int64_t r = 0; r < 3; ++r) {
        const quant::QuantizedRow row = quant::quantize_row(
            problem.x.data() + r * problem.args.x_stride, in, activations, codes.data());
        for (int o = 0; o < out; ++o) {
          double want = 0, size = 0;
          for (int i = 0; i < in; ++i) {
            const double w = quant::weight_at(problem.packed.view, o, i);
            const int group = i / problem.packed.view.group;
            // Codes are multiplied before their zero is taken away: those terms are larger.
            const double scale = quant::group_scale(problem.packed.view, o, group);
            const double largest = scale * quant::weight_code_at(problem.packed.view, o, i);
            const double x = double(codes[static_cast<size_t>(i)] - row.zero) * row.scale;
            want += x * w;
            size += 255.0 * row.scale * (std::fabs(w) + largest);
          }
          ASSERT_NEAR(got[static_cast<size_t>(r * problem.args.y_stride + o)], want,
                      (spans + 4) * 4 * kUnit * size);
        }
      }
    }
  }
}

TEST(QuantizeRow, CodesAreWithinHalfAStep) {
  for (const ActivationFormat format : {ActivationFormat{8, true}, ActivationFormat{4, true},
                                        ActivationFormat{8, false}, ActivationFormat{6, false}}) {
    for (const float center : {0.0f, 3.0f, -50.0f}) {  // the last two: no change of sign
      std::vector<float> x = normal_values(301, 7, 1.0f);
      for (float& v : x) v += center;
      std::vector<int8_t> codes(x.size());
      const quant::QuantizedRow row =
          quant::quantize_row(x.data(), static_cast<int64_t>(x.size()), format, codes.data());
      for (size_t i = 0; i < x.size(); ++i) {
        const double back = double(codes[i] - row.zero) * row.scale;
        // The zero is rounded too, so an end of the range may lie another half step out.
        const double steps = format.symmetric ? 0.5 : 1.0;
        EXPECT_NEAR(back, x[i], steps * row.scale * (1 + 1e-5));
      }
    }
  }
}

TEST(QuantizeRow, ZerosAndNothing) {
  std::vector<float> x(5, 0.0f);
  std::vector<int8_t> codes(5, 99);
  for (const bool symmetric : {true, false}) {
    const quant::QuantizedRow row = quant::quantize_row(x.data(), 5, {8, symmetric}, codes.data());
    for (const int8_t code : codes) EXPECT_EQ(code - row.zero, 0);
  }
  quant::quantize_row(x.data(), 0, {8, true}, codes.data());
}

}  // namespace
}  // namespace fq::backend
