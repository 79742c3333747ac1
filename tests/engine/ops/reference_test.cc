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
    for (const bool exact : {false, true}) {
      attention_reference({.q = q.data(),
                           .q_stride = heads * dims,
                           .out = out.data(),
                           .out_stride = heads * dims,
                           .rows = rows,
                           .begin = tokens - rows,
                           .heads = heads,
                           .scale = scale,
                           .kv = pages.view(tokens),
                           .exact = exact});
      for (int64_t row = 0; row < rows; ++row) {
        for (int head = 0; head < heads; ++head) {
          const size_t at = static_cast<size_t>((row * heads + head) * dims);
          const auto want =
              exact_attention(pages, q.data() + at, head / 2, tokens - rows + row + 1, scale);
          // Scores up to 16 err by 34 roundings each, exp turns that into 544 units (random signs:
          // far fewer); the mean of values below 5 keeps it. With codes a score is moved by its
          // query's rounding, in each of 32 dims uniform in a step of 2^-15 of at most 4.5, times
          // keys of deviation 1 and scale / sqrt(12): deviation 5.6e-5, of which six are 3.4e-4.
          // Weights err by 2^-16 of the largest.
          const bool integers = pages.layout.k.has_codes() && !exact;
          const double codes = integers ? 5 * 3.4e-4 + 5 * 0x1p-16 : 0;
          for (size_t d = 0; d < static_cast<size_t>(dims); ++d)
            ASSERT_NEAR(out[at + d], want[d], 5 * 600 * kUnit + codes);
        }
      }
    }
  }
}

TEST(AttentionReference, ProductsOfCodesAreExactAtTheLargestSums) {
  // 512 dims in one group, all codes 0 or 255 and queries at their largest: the sums reach what
  // int32 holds. One token gets all the weight.
  const int dims = 320;
  std::vector<float> k(2 * static_cast<size_t>(dims), 1.0f), v(k.size(), 1.0f);
  std::fill_n(k.begin(), dims, -1.0f);
  v[0] = -3.0f;
  const Pages pages(k, v, 1, dims, "kv8");
  ASSERT_EQ(pages.layout.k.group, dims);  // 128 does not divide it
  const std::vector<float> q(static_cast<size_t>(dims), 7.0f);
  std::vector<float> out(q.size());
  attention_reference({.q = q.data(),
                       .q_stride = dims,
                       .out = out.data(),
                       .out_stride = dims,
                       .rows = 1,
                       .begin = 1,
                       .heads = 1,
                       .scale = 0.05f,
                       .kv = pages.view(2)});
  for (const float value : out) EXPECT_NEAR(value, 1.0f, 1e-3);
}

TEST(AttentionReference, AQueryThatIsNotFiniteIsNanAlone) {
  const auto k = normal_values(3 * 8, 1), v = normal_values(3 * 8, 2);
  for (const char* format : {"kv32", "kv8"}) {
    const Pages pages(k, v, 1, 8, format);
    auto q = normal_values(2 * 8, 3);
    q[3] = INFINITY;
    std::vector<float> out(q.size());
    attention_reference({.q = q.data(),
                         .q_stride = 8,
                         .out = out.data(),
                         .out_stride = 8,
                         .rows = 2,
                         .begin = 1,
                         .heads = 1,
                         .scale = 0.3f,
                         .kv = pages.view(3)});
    for (size_t d = 0; d < 8; ++d) {
      EXPECT_TRUE(std::isnan(out[d])) << format;
      EXPECT_TRUE(std::isfinite(out[8 + d])) << format;
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

// Encoder attention with 8-bit queries and keys, in double precision, of one block and head.
std::vector<double> simulated_attention(const float* q, const float* k, const float* v,
                                        int64_t tokens, int64_t stride, int dims, double scale) {
  const size_t n = static_cast<size_t>(dims), count = static_cast<size_t>(tokens);
  std::vector<double> mean(n), out(count * n);
  const auto at = [&](const float* x, size_t t, size_t d) {
    return double{x[static_cast<int64_t>(t) * stride + static_cast<int64_t>(d)]};
  };
  for (size_t t = 0; t < count; ++t)
    for (size_t d = 0; d < n; ++d) mean[d] += at(k, t, d) / static_cast<double>(tokens);
  const auto rounded = [&](std::vector<double> row, double levels) {
    double most = 0;
    for (const double x : row) most = std::max(most, std::fabs(x));
    for (double& x : row) x = std::nearbyint(x / (most / levels)) * (most / levels);
    return row;
  };
  std::vector<std::vector<double>> keys, values(n, std::vector<double>(count));
  for (size_t t = 0; t < count; ++t) {
    std::vector<double> row(n);
    for (size_t d = 0; d < n; ++d) row[d] = at(k, t, d) - mean[d];
    keys.push_back(rounded(row, 127));
    for (size_t d = 0; d < n; ++d) values[d][t] = at(v, t, d);
  }
  for (auto& channel : values) channel = rounded(channel, 1023);
  for (size_t t = 0; t < count; ++t) {
    std::vector<double> row(n), p(count);
    for (size_t d = 0; d < n; ++d) row[d] = at(q, t, d);
    row = rounded(row, 127);
    double most = -1e300, sum = 0;
    for (size_t u = 0; u < count; ++u) {
      for (size_t d = 0; d < n; ++d) p[u] += row[d] * keys[u][d] * scale;
      most = std::max(most, p[u]);
    }
    for (double& x : p) sum += x = std::nearbyint(std::exp(x - most) * 8192);
    for (size_t d = 0; d < n; ++d) {
      for (size_t u = 0; u < count; ++u) out[t * n + d] += p[u] / sum * values[d][u];
    }
  }
  return out;
}

TEST(IntegerEncoderAttentionReference, IsTheAttentionOfItsCodes) {
  const int heads = 2, dims = 24;
  const int64_t tokens = 300, stride = heads * dims + 1;  // two spans of values
  auto q = normal_values(static_cast<size_t>(tokens * stride), 21);
  const auto k = normal_values(q.size(), 22), v = normal_values(q.size(), 23);
  std::vector<float> out(q.size());
  const EncoderAttentionArgs args{.q = q.data(),
                                  .k = k.data(),
                                  .v = v.data(),
                                  .out = out.data(),
                                  .stride = stride,
                                  .blocks = 1,
                                  .tokens = tokens,
                                  .heads = heads,
                                  .head_dim = dims,
                                  .scale = 0.4f};
  integer_encoder_attention_reference(args);
  std::vector<float> exact(q.size());
  EncoderAttentionArgs plain = args;
  plain.out = exact.data();
  encoder_attention_reference(plain);
  double moved = 0, off = 0, size = 0;
  for (int head = 0; head < heads; ++head) {
    const int64_t at = int64_t{head} * dims;
    const auto want = simulated_attention(q.data() + at, k.data() + at, v.data() + at, tokens,
                                          stride, dims, 0.4f);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int d = 0; d < dims; ++d) {
        const size_t i = static_cast<size_t>(t * stride + at + d);
        const double w = want[static_cast<size_t>(t * dims + d)];
        // A code of a key that rounding puts on the other side of a tie moves one score by a step
        // of 4 / 127 times 4 times the scale: 5 % of one weight, below 0.3 of a row. Probabilities
        // move by steps of 2^-13.
        ASSERT_NEAR(out[i], w, 4 * 0.3 * 0.05) << "token " << t << " dim " << d;
        off += (out[i] - w) * (out[i] - w);
        moved += (out[i] - exact[i]) * (out[i] - exact[i]);
        size += exact[i] * double{exact[i]};
      }
    }
  }
  // Ties are rare: what the codes change is far more than what rounding in another precision does.
  EXPECT_LT(std::sqrt(off / size), 2e-4);
  EXPECT_GT(std::sqrt(moved / size), 10 * std::sqrt(off / size));
  // Scores err by 0.4 * sqrt(24 * 2) * (3 / 127) / sqrt(12), 2 %, and a mean of many keeps less.
  EXPECT_LT(std::sqrt(moved / size), 0.02);
}

TEST(IntegerEncoderAttentionReference, WhatAllKeysHaveInCommonCostsNothing) {
  const int dims = 16;
  const int64_t tokens = 50;
  const auto q = normal_values(static_cast<size_t>(tokens * dims), 31),
             v = normal_values(q.size(), 33);
  auto k = normal_values(q.size(), 32);
  std::vector<float> before(q.size()), after(q.size());
  EncoderAttentionArgs args{.q = q.data(),
                            .k = k.data(),
                            .v = v.data(),
                            .out = before.data(),
                            .stride = dims,
                            .blocks = 1,
                            .tokens = tokens,
                            .heads = 1,
                            .head_dim = dims,
                            .scale = 0.25f};
  integer_encoder_attention_reference(args);
  for (size_t i = 0; i < k.size(); ++i) k[i] += i % dims == 5 ? 64.0f : -4.0f;
  args.out = after.data();
  integer_encoder_attention_reference(args);
  // The sums of the keys lose 2^-18 of 64; where that moves a code, a score moves by 0.25 * 3 * 3 /
  // 127.
  double off = 0, size = 0;
  for (size_t i = 0; i < q.size(); ++i) {
    off += std::pow(double{after[i]} - before[i], 2);
    size += std::pow(double{before[i]}, 2);
  }
  EXPECT_LT(std::sqrt(off / size), 2e-3);
}

TEST(IntegerEncoderAttentionReference, WhatIsNotFiniteStaysWhereItIs) {
  const int dims = 8;
  const int64_t tokens = 5;
  for (const int where : {0, 1, 2}) {
    std::vector<float> x[3];
    for (uint32_t i = 0; i < 3; ++i) x[i] = normal_values(2 * tokens * dims, 41 + i);
    x[where][3 * dims + 2] = where == 1 ? NAN : INFINITY;  // block 0, token 3
    std::vector<float> out(x[0].size());
    integer_encoder_attention_reference({.q = x[0].data(),
                                         .k = x[1].data(),
                                         .v = x[2].data(),
                                         .out = out.data(),
                                         .stride = dims,
                                         .blocks = 2,
                                         .tokens = tokens,
                                         .heads = 1,
                                         .head_dim = dims,
                                         .scale = 0.3f});
    for (int64_t t = 0; t < 2 * tokens; ++t) {
      const bool bad = where == 0 ? t == 3 : t < tokens;
      for (int d = 0; d < dims; ++d)
        EXPECT_EQ(std::isnan(out[static_cast<size_t>(t * dims + d)]), bad) << where << " " << t;
    }
  }
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
