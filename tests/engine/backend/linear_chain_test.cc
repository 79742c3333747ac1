// Several linears in one call, and activations applied to their sums, on every SIMD target: the
// same bits as one call each and the activation op after it.
#include "tests/engine/backend/linear_problem.h"

namespace fq::backend {
namespace {

using model::Activation;
using model::ActivationFormat;
using model::WeightFormat;
using Kind = WeightFormat::Kind;

struct Case {
  std::string target;
  WeightFormat weights;
  ActivationFormat inputs;
};

std::string case_name(const testing::TestParamInfo<Case>& info) {
  std::string name =
      info.param.target + "_" + info.param.weights.name() + "_" + info.param.inputs.name();
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

std::vector<Case> cases() {
  const WeightFormat w4{.kind = Kind::kAffine, .bits = 4, .group = 128};
  const WeightFormat w8{.kind = Kind::kAffine, .bits = 8, .group = 64};
  const WeightFormat w3{.kind = Kind::kAffine, .bits = 3, .group = 32};
  std::vector<Case> all;
  for (const std::string& target : simd_target_names()) {
    for (const WeightFormat& weights : {w4, w8, w3}) {
      all.push_back({target, weights, {}});
      all.push_back({target, weights, {.bits = 8, .symmetric = true}});
      all.push_back({target, weights, {.bits = 8, .symmetric = false}});
      all.push_back({target, weights, {.bf16 = true}});
    }
    all.push_back({target, {.kind = Kind::kF32}, {}});
    all.push_back({target, {.kind = Kind::kBF16}, {}});
    all.push_back({target, {.kind = Kind::kBF16}, {.bf16 = true}});
    all.push_back(
        {target, {.kind = Kind::kAffine, .bits = 4, .group = 32, .offset = true}, {.bf16 = true}});
  }
  return all;
}

class LinearChain : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    backend = backend_of(GetParam().target);
    fn = *backend->linear(GetParam().weights, GetParam().inputs);
  }
  // Problems of one shape have the same inputs.
  Problem problem(int out, int64_t rows, bool bias, bool accumulate = false) const {
    return Problem(GetParam().weights, out, 300, rows, bias, accumulate, GetParam().inputs);
  }

  std::unique_ptr<const Backend> backend;
  LinearFn fn = nullptr;
};

constexpr int64_t kRows[] = {1, 2, 5, 8, 9, 33, 130};

TEST_P(LinearChain, ComputesTheSameAsOneCallEach) {
  for (const int64_t rows : kRows) {
    SCOPED_TRACE(testing::Message() << "rows " << rows);
    // As q, k and v of an attention: one wide, two narrow, the last one added to what is there.
    Problem list[] = {problem(150, rows, true), problem(24, rows, false),
                      problem(17, rows, true, true)};
    std::vector<float> want[3], got[3];
    for (int i = 0; i < 3; ++i) {
      list[i].x = list[0].x;
      list[i].args.x = list[0].x.data();
      want[i] = list[i].run(fn, 1);
      got[i] = list[i].fresh_output();
    }
    ops::LinearArgs chain[3];
    for (int i = 2; i >= 0; --i) {
      chain[i] = list[i].args;
      chain[i].y = got[i].data();
      chain[i].next = i < 2 ? &chain[i + 1] : nullptr;
    }
    // As if the same linears came next.
    ops::LinearsAhead ahead;
    for (const Problem& one : list) ahead.add(one.packed.view);
    chain[0].ahead = &ahead;
    ThreadPool pool(3);
    on_new_thread([&] { fn(chain[0], pool); });
    for (int i = 0; i < 3; ++i) EXPECT_SAME_BITS(got[i], want[i]);
    if (HasFailure()) return;
  }
}

TEST_P(LinearChain, GatesWhatTheLinearBeforeHasWritten) {
  for (const Activation kind :
       {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
    for (const int64_t rows : kRows) {
      SCOPED_TRACE(testing::Message() << "activation " << int(kind) << " rows " << rows);
      const Problem up = problem(77, rows, true);
      Problem gate = problem(77, rows, rows % 2 == 0);
      // Other weights than those of `up`.
      std::reverse(gate.weights.begin(), gate.weights.end());
      auto packed = quant::pack_linear(gate.weights.data(), gate.out, gate.in, GetParam().weights,
                                       quant::AffineRange::kIncludeZero);
      ASSERT_TRUE(packed);
      gate.packed = std::move(*packed);
      if (rows % 2 == 0) gate.packed.view.bias = gate.bias.data();
      if (!GetParam().inputs.symmetric) gate.set_row_sums();

      ThreadPool pool(3);
      std::vector<float> want = up.run(fn, 1);
      const std::vector<float> gates = gate.run(fn, 1);
      std::vector<float> got = up.fresh_output();
      for (int64_t r = 0; r < rows; ++r) {
        float* const row = want.data() + r * gate.args.y_stride;
        (*backend->activation(kind))({.kind = kind,
                                      .x = gates.data() + r * gate.args.y_stride,
                                      .gate = row,
                                      .y = row,
                                      .count = gate.out},
                                     pool);
      }
      ops::LinearArgs second = gate.args;
      second.y = got.data();
      second.activation = kind;
      second.multiply = true;
      ops::LinearArgs first = up.args;
      first.y = got.data();
      first.next = &second;
      on_new_thread([&] { fn(first, pool); });
      EXPECT_SAME_BITS(got, want);
      // Kernels with inputs in bfloat16 may add in an order of their own.
      if (has_fma(GetParam().target) && !GetParam().inputs.bf16) {
        std::vector<float> reference = up.fresh_output();
        first.y = second.y = reference.data();
        ops::linear_reference(first);
        EXPECT_SAME_BITS(reference, want);
      }
      if (HasFailure()) return;
    }
  }
}

TEST_P(LinearChain, AppliesAnActivationToASingleLinear) {
  for (const int64_t rows : kRows) {
    SCOPED_TRACE(testing::Message() << "rows " << rows);
    const Problem one = problem(77, rows, true);
    ThreadPool pool(2);
    const std::vector<float> sums = one.run(fn, 1);
    std::vector<float> want = sums, got = one.fresh_output();
    for (int64_t r = 0; r < rows; ++r) {
      (*backend->activation(Activation::kGeluTanh))({.kind = Activation::kGeluTanh,
                                                     .x = sums.data() + r * one.args.y_stride,
                                                     .gate = nullptr,
                                                     .y = want.data() + r * one.args.y_stride,
                                                     .count = one.out},
                                                    pool);
    }
    ops::LinearArgs args = one.args;
    args.y = got.data();
    args.activation = Activation::kGeluTanh;
    on_new_thread([&] { fn(args, pool); });
    EXPECT_SAME_BITS(got, want);
    if (HasFailure()) return;
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(LinearChain);  // a machine without SIMD
INSTANTIATE_TEST_SUITE_P(Targets, LinearChain, testing::ValuesIn(cases()), case_name);

}  // namespace
}  // namespace fq::backend
