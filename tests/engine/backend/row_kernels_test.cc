// Kernels of norms, rotary embedding, activations and similarity against the scalar references, on
// every SIMD target.
#include "tests/engine/backend/kernel_testing.h"

namespace fq::backend {
namespace {

class RowKernels : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { backend_ = backend_of(GetParam()); }

  // Bitwise on targets with a fused multiply-add; else within `bound` ulp of the size of the values
  // that were combined.
  void expect_equal(const std::vector<float>& got, const std::vector<float>& want, double bound) {
    if (has_fma(GetParam())) {
      EXPECT_SAME_BITS(got, want);
      return;
    }
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], bound) << "element " << i;
  }

  std::unique_ptr<const Backend> backend_;
  ThreadPool pool_{3};
};

TEST_P(RowKernels, NormsEqualTheReferences) {
  for (const int64_t width : {1, 7, 15, 16, 17, 100, 896, 1153}) {
    for (const int64_t rows : {1, 3, 40}) {
      SCOPED_TRACE(testing::Message() << "width " << width << " rows " << rows);
      const auto x = stress_values(static_cast<size_t>(rows * width), static_cast<uint32_t>(width));
      const auto weight = normal_values(static_cast<size_t>(width), 3);
      const auto bias = normal_values(static_cast<size_t>(width), 4);
      std::vector<float> got(x.size()), want(x.size());
      ops::NormArgs args{.x = x.data(),
                         .y = want.data(),
                         .rows = rows,
                         .width = width,
                         .weight = weight.data(),
                         .bias = nullptr,
                         .eps = 1e-6f};
      // A normalised value is at most sqrt(width) <= 34, a weight at most 5; sums of squares and
      // mean lose (width/16 + 8) units relatively in either order.
      const double bound = 34.0 * 5.0 * 4.0 * (static_cast<double>(width) / 16 + 16) * kUnit;
      ops::rms_norm_reference(args);
      args.y = got.data();
      (*backend_->norm(model::NormKind::kRms))(args, pool_);
      expect_equal(got, want, bound);

      args.bias = bias.data();
      args.y = want.data();
      ops::layer_norm_reference(args);
      std::vector<float> in_place = x;
      args.x = in_place.data();
      args.y = in_place.data();
      (*backend_->norm(model::NormKind::kLayer))(args, pool_);
      expect_equal(in_place, want, bound + 4 * 5 * kUnit);
    }
  }
}

TEST_P(RowKernels, RopeEqualsTheReference) {
  const std::vector<float> frequencies = normal_values(64, 8);
  for (const auto& [dims, head_dim] :
       std::vector<std::pair<int, int>>{{2, 8}, {24, 24}, {32, 64}, {72, 80}, {128, 128}}) {
    SCOPED_TRACE(dims);
    const int64_t rows = 50, stride = 3 * head_dim + 1;
    const auto x = normal_values(static_cast<size_t>(rows * stride), 5);
    std::vector<int32_t> positions(static_cast<size_t>(rows));
    // Positions that share a place in the cache, and repeat.
    for (size_t i = 0; i < positions.size(); ++i)
      positions[i] = static_cast<int32_t>(i % 7 * 2048 + i % 3);
    std::vector<float> got = x, want = x;
    ops::RopeArgs args{.x = want.data(),
                       .stride = stride,
                       .rows = rows,
                       .heads = 3,
                       .head_dim = head_dim,
                       .positions = positions.data(),
                       .table = {frequencies.data(), dims}};
    ops::rope_reference(args);
    args.x = got.data();
    (*backend_->rope())(args, pool_);
    EXPECT_SAME_BITS(got, want);  // nothing in it is fused
    got = x;
    std::vector<float> other = frequencies;  // same place, other values: the cache must notice
    args.table.inv_freq = other.data();
    for (float& f : other) f *= 0.5f;
    want = x;
    args.x = want.data();
    ops::rope_reference(args);
    args.x = got.data();
    (*backend_->rope())(args, pool_);
    EXPECT_SAME_BITS(got, want);
  }
}

TEST_P(RowKernels, ActivationsEqualTheReferences) {
  using model::Activation;
  std::vector<float> x;
  for (int i = -40000; i <= 40000; ++i) x.push_back(static_cast<float>(i) * 0.0037f);
  for (const float extreme :
       {0.0f, -0.0f, 1e-40f, -1e-40f, 1e30f, -1e30f, 88.7f, -88.7f, 89.5f, -104.0f}) {
    x.push_back(extreme);
  }
  const std::vector<float> gate = normal_values(x.size(), 6);
  for (const Activation kind :
       {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh, Activation::kSilu}) {
    for (const float* g : {static_cast<const float*>(nullptr), gate.data()}) {
      SCOPED_TRACE(static_cast<int>(kind));
      std::vector<float> got(x.size()), want(x.size());
      ops::ActivationArgs args{.kind = kind,
                               .x = x.data(),
                               .gate = g,
                               .y = want.data(),
                               .count = static_cast<int64_t>(x.size())};
      ops::activation_reference(args);
      args.y = got.data();
      (*backend_->activation(kind))(args, pool_);
      if (has_fma(GetParam())) {
        EXPECT_SAME_BITS(got, want);
        continue;
      }
      // Without fusion the exponent's reduction loses a few units: 32 units of the value, which
      // gate scales, and of the exponent's argument (at most 150^2 / 2 for gelu, where the value is
      // below 1e-30 anyway).
      for (size_t i = 0; i < got.size(); ++i) {
        ASSERT_NEAR(got[i], want[i], 64 * kUnit * std::max(1e-6f, std::fabs(want[i]))) << x[i];
      }
    }
  }
}

TEST_P(RowKernels, SimilarityEqualsTheReference) {
  for (const int64_t width : {1, 15, 64, 130}) {
    const int64_t rows = 60, stride = width + 2;
    auto x = normal_values(static_cast<size_t>(rows * stride), 7);
    std::fill_n(x.begin() + 5 * stride, width, 0.0f);   // a zero row
    std::fill_n(x.begin() + 6 * stride, width, 3e38f);  // a norm that overflows
    std::vector<int32_t> prev(static_cast<size_t>(rows));
    for (int32_t i = 0; i < rows; ++i) prev[static_cast<size_t>(i)] = i % 4 == 0 ? -1 : i - 1;
    std::vector<float> got(prev.size()), want(prev.size());
    ops::SimilarityArgs args{.x = x.data(),
                             .stride = stride,
                             .rows = rows,
                             .width = width,
                             .prev = prev.data(),
                             .out = want.data()};
    ops::similarity_reference(args);
    args.out = got.data();
    (*backend_->similarity())(args, pool_);
    // |dot| <= product of norms, so the ratio errs by 3 sums of width/16 + 8 terms, rounded twice
    // each.
    expect_equal(got, want, 6.0 * (static_cast<double>(width) / 16 + 16) * kUnit);
    EXPECT_EQ(got[4], -2.0f);
    EXPECT_EQ(got[5], -2.0f);
    EXPECT_EQ(got[6], -2.0f);
    EXPECT_EQ(got[7], -2.0f);
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(RowKernels);  // a machine without SIMD
INSTANTIATE_TEST_SUITE_P(Targets, RowKernels, testing::ValuesIn(simd_target_names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace fq::backend
