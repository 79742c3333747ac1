// The scalar references against definitions in double precision and against golden vectors.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "src/core/aligned.h"
#include "src/ops/math.h"
#include "src/ops/ops.h"
#include "src/quant/affine_weights.h"
#include "tests/engine/quant/golden.h"

namespace fq::ops {
namespace {

constexpr double kUnit = 0x1p-24;

std::vector<float> normal_values(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

TEST(LinearReference, IsTheProductWithDequantizedWeights) {
  const int out = 21, in = 90, rows = 3;
  const auto w = normal_values(static_cast<size_t>(out * in), 1);
  const auto x = normal_values(static_cast<size_t>(rows * in), 2);
  const auto bias = normal_values(static_cast<size_t>(out), 3);
  auto packed = quant::pack_linear(
      w.data(), out, in, {.kind = model::WeightFormat::Kind::kAffine, .bits = 4, .group = 32},
      quant::AffineRange::kIncludeZero);
  ASSERT_TRUE(packed);
  packed->view.bias = bias.data();
  for (const bool accumulate : {false, true}) {
    std::vector<float> y(static_cast<size_t>(rows * out), 0.5f);
    linear_reference({.x = x.data(),
                      .x_stride = in,
                      .rows = rows,
                      .w = &packed->view,
                      .y = y.data(),
                      .y_stride = out,
                      .accumulate = accumulate});
    for (int r = 0; r < rows; ++r) {
      for (int o = 0; o < out; ++o) {
        double sum = bias[static_cast<size_t>(o)] + (accumulate ? 0.5 : 0.0),
               size = std::fabs(sum) + 1;
        for (int i = 0; i < in; ++i) {
          const double term =
              double{x[static_cast<size_t>(r * in + i)]} * quant::weight_at(packed->view, o, i);
          sum += term;
          size += std::fabs(term);
        }
        // One rounding per term and two more.
        ASSERT_NEAR(y[static_cast<size_t>(r * out + o)], sum, (in + 2) * kUnit * size);
      }
    }
  }
}

TEST(NormReference, EqualsTheDefinition) {
  const int64_t width = 100, rows = 4;
  const auto x = normal_values(static_cast<size_t>(rows * width), 4);
  const auto weight = normal_values(static_cast<size_t>(width), 5),
             bias = normal_values(static_cast<size_t>(width), 6);
  std::vector<float> rms(x.size()), layer(x.size());
  NormArgs args{.x = x.data(),
                .y = rms.data(),
                .rows = rows,
                .width = width,
                .weight = weight.data(),
                .bias = nullptr,
                .eps = 1e-5f};
  rms_norm_reference(args);
  args.y = layer.data();
  args.bias = bias.data();
  layer_norm_reference(args);
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0, square = 0, variance = 0;
    for (int64_t i = 0; i < width; ++i) {
      const double v = x[static_cast<size_t>(r * width + i)];
      mean += v / width;
      square += v * v / width;
    }
    for (int64_t i = 0; i < width; ++i)
      variance += std::pow(x[static_cast<size_t>(r * width + i)] - mean, 2) / width;
    for (int64_t i = 0; i < width; ++i) {
      const size_t at = static_cast<size_t>(r * width + i);
      const double w = weight[static_cast<size_t>(i)];
      const double want_rms = x[at] / std::sqrt(square + 1e-5) * w;
      const double want_layer =
          (x[at] - mean) / std::sqrt(variance + 1e-5) * w + bias[static_cast<size_t>(i)];
      // Sums of 100 / 16 + 4 roundings, halved by the root, and a few more; the mean's error is
      // absolute.
      ASSERT_NEAR(rms[at], want_rms, 16 * kUnit * std::fabs(want_rms) + 1e-12);
      ASSERT_NEAR(layer[at], want_layer,
                  24 * kUnit * (std::fabs(want_layer) + 2 * std::fabs(w) + 3));
    }
  }
}

TEST(RopeReference, RotatesPairsAndKeepsTheRest) {
  const std::vector<float> frequencies = {1.0f, 0.25f};
  const std::vector<int32_t> positions = {0, 1, 1000};
  const auto x = normal_values(3 * 2 * 6, 7);
  std::vector<float> y = x;
  rope_reference({.x = y.data(),
                  .stride = 12,
                  .rows = 3,
                  .heads = 2,
                  .head_dim = 6,
                  .positions = positions.data(),
                  .table = {frequencies.data(), 4}});
  for (size_t row = 0; row < 3; ++row) {
    for (size_t head = 0; head < 2; ++head) {
      const float* const a = x.data() + row * 12 + head * 6;
      const float* const b = y.data() + row * 12 + head * 6;
      for (size_t i = 0; i < 2; ++i) {
        const double angle = static_cast<double>(positions[row]) * frequencies[i];
        EXPECT_NEAR(b[i], a[i] * std::cos(angle) - a[i + 2] * std::sin(angle), 1e-6);
        EXPECT_NEAR(b[i + 2], a[i + 2] * std::cos(angle) + a[i] * std::sin(angle), 1e-6);
      }
      EXPECT_EQ(b[4], a[4]);
      EXPECT_EQ(b[5], a[5]);
    }
  }
}

// Pages around given keys and values [tokens, kv_heads * head_dim].
struct Pages {
  quant::KvPageLayout layout;
  std::vector<AlignedBuffer<std::byte>> storage;
  std::vector<std::byte*> pages;

  Pages(const std::vector<float>& k, const std::vector<float>& v, int kv_heads, int head_dim,
        const char* format)
      : layout(*quant::KvPageLayout::make(*quant::parse_kv_format(format), kv_heads, head_dim)) {
    const int64_t width = int64_t{kv_heads} * head_dim;
    const int64_t tokens = static_cast<int64_t>(k.size()) / width;
    for (int64_t i = 0; i < tokens; i += quant::kPageTokens) {
      storage.emplace_back(layout.page_bytes);
      pages.push_back(storage.back().data());
    }
    kv_append_reference({.k = k.data(),
                         .v = v.data(),
                         .k_stride = width,
                         .v_stride = width,
                         .rows = tokens,
                         .begin = 0,
                         .kv = view(tokens)});
  }
  KvView view(int64_t length) const { return {&layout, pages.data(), length}; }
};

// softmax(scale q K^T) V of one row and head, over the stored values, in double.
std::vector<double> exact_attention(const Pages& pages, const float* q, int kv_head,
                                    int64_t visible, double scale) {
  const size_t dims = static_cast<size_t>(pages.layout.head_dim);
  std::vector<float> k(dims), v(dims);
  std::vector<double> scores, out(dims);
  double most = -1e300, sum = 0;
  for (int64_t t = 0; t < visible; ++t) {
    quant::kv_read_reference(pages.layout, pages.pages[static_cast<size_t>(t / 64)],
                             static_cast<int>(t % 64), kv_head, k.data(), v.data());
    double s = 0;
    for (size_t d = 0; d < dims; ++d) s += double{q[d]} * k[d];
    scores.push_back(s * scale);
    most = std::max(most, scores.back());
  }
  for (double& s : scores) sum += s = std::exp(s - most);
  for (int64_t t = 0; t < visible; ++t) {
    quant::kv_read_reference(pages.layout, pages.pages[static_cast<size_t>(t / 64)],
                             static_cast<int>(t % 64), kv_head, k.data(), v.data());
    for (size_t d = 0; d < dims; ++d) out[d] += scores[static_cast<size_t>(t)] / sum * v[d];
  }
  return out;
}

TEST(AttentionReference, EqualsSoftmaxInDoublePrecision) {
  const int heads = 4, kv_heads = 2, dims = 32;
  const int64_t tokens = 600, rows = 130;  // over the border of two chunks
  for (const char* format : {"kv32", "kv16", "kv8", "k6v4", "k3v2g16"}) {
    const auto k = normal_values(static_cast<size_t>(tokens * kv_heads * dims), 8);
    const auto v = normal_values(k.size(), 9);
    const Pages pages(k, v, kv_heads, dims, format);
    const auto q = normal_values(static_cast<size_t>(rows * heads * dims), 10);
    std::vector<float> out(q.size());
    const float scale = 0.25f;
    attention_reference({.q = q.data(),
                         .q_stride = heads * dims,
                         .out = out.data(),
                         .out_stride = heads * dims,
                         .rows = rows,
                         .begin = tokens - rows,
                         .heads = heads,
                         .scale = scale,
                         .kv = pages.view(tokens)});
    for (int64_t row = 0; row < rows; ++row) {
      for (int head = 0; head < heads; ++head) {
        const size_t at = static_cast<size_t>((row * heads + head) * dims);
        const auto want =
            exact_attention(pages, q.data() + at, head / 2, tokens - rows + row + 1, scale);
        // Scores up to 16 err by 34 roundings each, exp turns that into 544 units (random signs:
        // far fewer); the mean of values below 5 keeps it.
        for (size_t d = 0; d < static_cast<size_t>(dims); ++d)
          ASSERT_NEAR(out[at + d], want[d], 5 * 600 * kUnit);
      }
    }
  }
}

TEST(AttentionReference, LargeScoresDoNotOverflow) {
  const std::vector<float> k = {1000.0f, -1000.0f, 999.0f}, v = {1.0f, 2.0f, 4.0f};
  const Pages pages(k, v, 1, 1, "kv32");
  const std::vector<float> q = {100.0f};
  float out = 0;
  attention_reference({.q = q.data(),
                       .q_stride = 1,
                       .out = &out,
                       .out_stride = 1,
                       .rows = 1,
                       .begin = 2,
                       .heads = 1,
                       .scale = 1.0f,
                       .kv = pages.view(3)});
  EXPECT_EQ(out, 1.0f);
}

TEST(EncoderAttentionReference, BlocksDoNotSeeEachOther) {
  const int heads = 2, dims = 8;
  const int64_t tokens = 70, stride = heads * dims;
  auto x = normal_values(static_cast<size_t>(2 * tokens * stride), 11);
  std::vector<float> both(x.size()), changed(x.size());
  EncoderAttentionArgs args{.q = x.data(),
                            .k = x.data(),
                            .v = x.data(),
                            .out = both.data(),
                            .stride = stride,
                            .blocks = 2,
                            .tokens = tokens,
                            .heads = heads,
                            .head_dim = dims,
                            .scale = 0.3f};
  encoder_attention_reference(args);
  const std::vector<float> k(x.begin(), x.begin() + tokens * stride);
  const Pages pages(k, k, heads, dims, "kv32");
  for (int64_t row = 0; row < tokens; ++row) {
    for (int head = 0; head < heads; ++head) {
      const size_t at = static_cast<size_t>((row * heads + head) * dims);
      const auto want = exact_attention(pages, x.data() + at, head, tokens, 0.3);
      for (size_t d = 0; d < static_cast<size_t>(dims); ++d)
        ASSERT_NEAR(both[at + d], want[d], 5 * 600 * kUnit);
    }
  }
  std::fill(x.begin() + tokens * stride, x.end(), 9.0f);
  args.out = changed.data();
  encoder_attention_reference(args);
  EXPECT_TRUE(std::equal(both.begin(), both.begin() + tokens * stride, changed.begin()));
}

TEST(ImportanceReference, EqualsTheGoldenMeans) {
  SKIP_WITHOUT_GOLDEN_FILE("framefusion/unit_functions.safetensors");
  const testing::GoldenTensors golden("framefusion/unit_functions.safetensors");
  for (const auto& [name, kv_heads, queries] :
       {std::tuple{"attn_q1", 4, 1}, {"attn_q4", 4, 4}, {"attn_q1_gqa", 2, 1}}) {
    const int heads = 4, dims = 8, tokens = 12;
    const std::string prefix = name;
    std::vector<float> k, q;  // [token, head, dim] from [head, token, dim]
    for (int t = 0; t < tokens; ++t) {
      for (int h = 0; h < kv_heads; ++h) {
        for (int d = 0; d < dims; ++d)
          k.push_back(golden.floats(prefix + ".k")[(h * tokens + t) * dims + d]);
      }
    }
    for (int t = tokens - queries; t < tokens; ++t) {
      for (int h = 0; h < heads; ++h) {
        for (int d = 0; d < dims; ++d)
          q.push_back(golden.floats(prefix + ".q")[(h * tokens + t) * dims + d]);
      }
    }
    const Pages pages(k, k, kv_heads, dims, "kv32");
    std::vector<float> out(tokens);
    importance_reference({.q = q.data(),
                          .q_stride = heads * dims,
                          .queries = queries,
                          .heads = heads,
                          .scale = 1.0f / std::sqrt(8.0f),
                          .kv = pages.view(tokens),
                          .out = out.data()});
    for (int t = 0; t < tokens; ++t) {
      // Both are float32: some 30 roundings of probabilities below 1.
      EXPECT_NEAR(out[static_cast<size_t>(t)], golden.floats(prefix + ".importance")[t], 2e-6)
          << prefix << " " << t;
    }
  }
}

TEST(SimilarityReference, EqualsTheGoldenCosines) {
  SKIP_WITHOUT_GOLDEN_FILE("framefusion/unit_functions.safetensors");
  const testing::GoldenTensors golden("framefusion/unit_functions.safetensors");
  const int pairs = 10, width = 32;
  std::vector<float> x(golden.floats("cos.a"), golden.floats("cos.a") + pairs * width);
  x.insert(x.end(), golden.floats("cos.b"), golden.floats("cos.b") + pairs * width);
  std::vector<int32_t> prev(2 * pairs, -1);
  for (int i = 0; i < pairs; ++i) prev[static_cast<size_t>(i)] = pairs + i;
  std::vector<float> out(prev.size());
  similarity_reference({.x = x.data(),
                        .stride = width,
                        .rows = 2 * pairs,
                        .width = width,
                        .prev = prev.data(),
                        .out = out.data()});
  int compared = 0;
  for (int i = 0; i < pairs; ++i) {
    const float want = golden.floats("cos.out")[i];
    if (std::isfinite(want)) {
      EXPECT_NEAR(out[static_cast<size_t>(i)], want, 8 * kUnit)
          << i;  // two orders of adding 32 products
      ++compared;
    } else {
      EXPECT_EQ(out[static_cast<size_t>(i)], kNoSimilarity) << i;  // trap T8 of the contract
    }
    EXPECT_EQ(out[static_cast<size_t>(pairs + i)], kNoSimilarity);
  }
  EXPECT_GT(compared, 5);
}

}  // namespace
}  // namespace fq::ops
