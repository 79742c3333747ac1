// What the tests of linear kernels share: formats, and one linear with its inputs and references.
#pragma once

#include "src/quant/affine_weights.h"
#include "src/quant/row_sums.h"
#include "tests/engine/backend/kernel_testing.h"

namespace fq::backend {

// Every width, with groups, zeros, offsets and types of scales in turn.
inline std::vector<model::WeightFormat> affine_formats() {
  using Kind = model::WeightFormat::Kind;
  std::vector<model::WeightFormat> formats;
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    formats.push_back({Kind::kAffine, bits, 128, false, DType::kF16});
    formats.push_back({Kind::kAffine, bits, 64, true, DType::kF32});
    formats.push_back({Kind::kAffine, bits, 32, false, DType::kF32});
    formats.push_back({Kind::kAffine, bits, 0, true, DType::kF16});
    formats.push_back({Kind::kAffine, bits, 16, true, DType::kF32});
    formats.push_back({Kind::kAffine, bits, 32, false, DType::kF16, true});
    // Products of codes and scales that are not exact.
    if (bits == 4) formats.push_back({Kind::kAffine, bits, 64, false, DType::kF32, true});
    if (bits == 5) formats.push_back({Kind::kAffine, bits, 128, false, DType::kF32, true});
    if (bits == 8) formats.push_back({Kind::kAffine, bits, 32, false, DType::kI8, true});
    // Those of GGUF: factors of steps.
    formats.push_back(bits == 4 || bits == 5
                          ? model::WeightFormat{Kind::kAffine, bits, 32, false, DType::kI8, true}
                          : model::WeightFormat{Kind::kAffine, bits, 16, true, DType::kI8});
  }
  return formats;
}

// One linear with its inputs; outputs sit in wider rows whose margin must not be touched.
struct Problem {
  static constexpr int64_t kMargin = 3;
  static constexpr float kSentinel = 12345.0f;

  int out, in;
  int64_t rows;
  std::vector<float> weights, bias, x, y, row_sums;
  quant::PackedLinear packed;
  ops::LinearArgs args;

  Problem(const model::WeightFormat& format, int out_, int in_, int64_t rows_, bool with_bias,
          bool accumulate, model::ActivationFormat activations = {})
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
            .accumulate = accumulate,
            .activations = activations};
    if (!activations.symmetric) set_row_sums();
  }

  // As blocks do when they are bound.
  void set_row_sums() {
    row_sums.resize(static_cast<size_t>(packed.view.tiles) * quant::kTileRows);
    for (int tile = 0; tile < packed.view.tiles; ++tile) {
      quant::row_sums_of_tile(packed.view, tile, row_sums.data() + tile * quant::kTileRows);
    }
    packed.view.row_sums = row_sums.data();
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
    on_new_thread([&] { kernel(a, pool); });
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

}  // namespace fq::backend
