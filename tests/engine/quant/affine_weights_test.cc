// The weight quantizer against the reference's own codes, scales and zeros; packing against the
// layout written down in engine/CONTRACT.md 1.3; binding against an independent packer.
#include "src/quant/affine_weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "src/quant/number.h"
#include "tests/engine/quant/golden.h"
#include "tests/engine/testing/model_builder.h"

namespace fq::quant {
namespace {

using model::WeightFormat;
using testing::affine_format;

TEST(WeightQuantizer, EqualsTheReferenceBitForBit) {
  SKIP_WITHOUT_GOLDEN_FILE("quantization/weight_fp32.safetensors");
  const testing::GoldenTensors inputs("quantization/inputs.safetensors");
  const testing::GoldenTensors golden("quantization/weight_fp32.safetensors");
  const auto manifest = testing::golden_manifest("quantization/manifest.json");
  const int out = 16, in = 256;
  const float* const w = inputs.floats("weight");
  int cases = 0;
  for (const auto& [name, info] : manifest["files"]["weight_fp32.safetensors"]["cases"].items()) {
    const int bits = info["bits"], group_size = info["group_size"];
    if (info["per_tensor"]) continue;
    ++cases;
    SCOPED_TRACE(name);
    const bool symmetric = info["symmetric"];
    const WeightFormat format =
        affine_format(bits, std::max(0, group_size), symmetric, DType::kF32);
    const auto packed = pack_linear(w, out, in, format, AffineRange::kReference);
    ASSERT_TRUE(packed);
    const LinearWeights& view = packed->view;
    const auto* const codes = golden[name + ".q"].bytes.data();
    const int group = group_size > 0 ? group_size : in;
    for (int row = 0; row < out; ++row) {
      for (int col = 0; col < in; ++col) {
        const int64_t g = int64_t{row} * (in / group) + col / group;
        const int64_t stored = (int64_t{row / 8} * view.groups + col / group) * 8 + row % 8;
        ASSERT_EQ(static_cast<const float*>(view.scales)[stored],
                  golden.floats(name + ".scale")[g]);
        int code = static_cast<uint8_t>(codes[row * in + col]);
        int zero = 0;
        if (symmetric) {
          code = static_cast<int8_t>(code);
        } else {
          zero = static_cast<uint8_t>(golden[name + ".zero"].bytes[static_cast<size_t>(g)]);
          ASSERT_EQ(view.zeros[stored], zero);
        }
        const float want = static_cast<float>(code - zero) * golden.floats(name + ".scale")[g];
        ASSERT_EQ(weight_at(view, row, col), want)
            << "row " << row << " col " << col << " code " << code;
      }
    }
  }
  EXPECT_EQ(cases, 40);
}

TEST(WeightQuantizer, ScaleIsRoundedBeforeTheCodes) {
  // With codes made for the unrounded scale, some of these would be off by more than half a
  // (rounded) step.
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const bool symmetric : {false, true}) {
      const WeightFormat format = affine_format(bits, 32, symmetric, DType::kF16);
      const float steps = static_cast<float>((1 << bits) - 1);
      for (int trial = 0; trial < 500; ++trial) {
        std::vector<float> x(32);
        for (float& value : x) value = normal(random);
        const WeightGroup g = weight_group(x.data(), 32, format, AffineRange::kIncludeZero);
        ASSERT_EQ(g.scale, float_from_half(half_from_float(g.scale)));
        for (const float value : x) {
          const float back = static_cast<float>(weight_code(value, g, bits) - g.zero) * g.scale;
          const float low = -static_cast<float>(g.zero) * g.scale,
                      high = (steps - static_cast<float>(g.zero)) * g.scale;
          if (value < low || value > high) continue;  // beyond the ends: clamped
          ASSERT_LE(std::fabs(back - value), 0.5001f * g.scale + steps * g.scale * 0x1p-23f);
        }
      }
    }
  }
}

// A step is shared by groups of very different sizes: each has to reach its own values all the
// same, with a factor that is an integer of at most 127.
TEST(WeightQuantizer, GroupsThatShareAStepReachTheirValues) {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  const int out = 5, in = 600;
  for (const int bits : {2, 4, 5, 6, 8}) {
    for (const int group : {16, 32, 128}) {
      for (const int kind : {0, 1, 2}) {
        WeightFormat format = affine_format(bits, group, kind == 1, DType::kI8);
        format.offset = kind == 2;
        SCOPED_TRACE(format.name());
        std::vector<float> w(out * in);
        for (int i = 0; i < out * in; ++i) {
          const int g = i % in / group;
          w[static_cast<size_t>(i)] =
              (normal(random) + 0.5f) * std::ldexp(1.0f, -(g * 5 % 7) - i / in);
        }
        const auto packed = pack_linear(w.data(), out, in, format, AffineRange::kIncludeZero);
        ASSERT_TRUE(packed) << packed.error().to_string();
        const LinearWeights& v = packed->view;
        ASSERT_EQ(v.steps, 3);
        EXPECT_EQ(v.bytes, static_cast<int64_t>(packed->data_bytes) +
                               16 * v.groups * (kind == 1 ? 1 : 2) + 16 * 3 * (kind == 2 ? 4 : 2));
        for (int row = 0; row < out; ++row) {
          for (int col = 0; col < in; ++col) {
            const int g = col / group;
            const int64_t at = (int64_t{row / 8} * v.groups + g) * 8 + row % 8;
            const int factor = static_cast<const int8_t*>(v.scales)[at];
            const int64_t step_at = (int64_t{row / 8} * v.steps + col / 256) * 8 + row % 8;
            const float step =
                float_from_half(static_cast<const uint16_t*>(v.scale_steps)[step_at]);
            const float scale = group_scale(v, row, g);
            ASSERT_GE(factor, 1);
            ASSERT_EQ(scale, static_cast<float>(factor) * step);
            const float x = w[static_cast<size_t>(row * in + col)];
            const float slack = (scale * static_cast<float>(1 << bits) + std::fabs(x)) * 0x1p-21f;
            ASSERT_LE(std::fabs(weight_at(v, row, col) - x), 0.5f * scale + slack)
                << row << " " << col;
          }
        }
      }
    }
  }
}

TEST(WeightPacking, PaddingIsThatOfTheContract) {
  const std::vector<float> w(5 * 37, 1.0f);
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const bool symmetric : {false, true}) {
      const auto p = pack_linear(w.data(), 5, 37, affine_format(bits, 32, symmetric),
                                 AffineRange::kIncludeZero);
      ASSERT_TRUE(p);
      const LinearWeights& v = p->view;
      EXPECT_EQ(v.tiles, 2);
      EXPECT_EQ(v.groups, 2);
      EXPECT_EQ(p->data_bytes, 16u * 64 * static_cast<size_t>(bits) / 8);
      EXPECT_EQ(p->scale_bytes, 2u * 2 * 8 * 2);
      EXPECT_EQ(p->zero_bytes, symmetric ? 0u : 2u * 2 * 8);
      EXPECT_EQ(v.bytes, static_cast<int64_t>(p->data_bytes + p->scale_bytes + p->zero_bytes));
      for (int row = 0; row < 16; ++row) {
        for (int col = 0; col < 64; ++col) {
          if (row >= 5 || col >= 37) {
            ASSERT_EQ(weight_at(v, row, col), 0.0f) << row << " " << col;
          }
        }
      }
    }
  }
}

TEST(WeightPacking, UnknownFormatsAreRefused) {
  const std::vector<float> w(16, 1.0f);
  for (const WeightFormat& format :
       {affine_format(7, 32), affine_format(4, 48), affine_format(8, 32, false, DType::kBF16),
        affine_format(4, 0, false, DType::kI8)}) {
    const auto packed = pack_linear(w.data(), 4, 4, format, AffineRange::kIncludeZero);
    ASSERT_FALSE(packed);
    EXPECT_EQ(packed.error().code, Code::kUnsupported);
  }
}

class BindLinear : public ::testing::TestWithParam<WeightFormat> {};

TEST_P(BindLinear, ReadsWhatAnIndependentPackerWrote) {
  testing::TempDir dir;
  testing::TinyModelOptions options;
  options.format = GetParam();
  options.hidden = 40;  // not a multiple of 32: padded inputs
  options.head_dim = 10;
  options.mlp_hidden = 52;
  const testing::TinyModel written = testing::write_tiny_model(dir / "model", options);
  const auto directory = model::ModelDirectory::open(dir / "model", true);
  ASSERT_TRUE(directory) << directory.error().to_string();
  int checked = 0;
  for (const auto& [name, spec] : (*directory)->spec().linears) {
    const bool bias = written.values.contains(name + ".bias");
    const auto bound = bind_linear(**directory, name, bias);
    ASSERT_TRUE(bound) << bound.error().to_string();
    EXPECT_EQ(bound->out, spec.out);
    EXPECT_EQ(bound->in, spec.in);
    const std::vector<float>& want = written.values.at(name);
    std::vector<float> row(static_cast<size_t>(spec.in));
    for (int r = 0; r < spec.out; ++r) {
      dequantize_row(*bound, r, row.data());
      for (int c = 0; c < spec.in; ++c) {
        ASSERT_EQ(row[static_cast<size_t>(c)], want[static_cast<size_t>(r * spec.in + c)])
            << name << " " << r << " " << c;
      }
    }
    if (bias) {
      const std::vector<float>& values = written.values.at(name + ".bias");
      for (int r = 0; r < spec.out; ++r) ASSERT_EQ(bound->bias[r], values[static_cast<size_t>(r)]);
    }
    ++checked;
  }
  EXPECT_EQ(checked, 1 + 2 * 7);
  const auto missing = bind_linear(**directory, "decoder.layers.7.attention.q", false);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, Code::kNotFound);
  EXPECT_NE(missing.error().message.find("decoder.layers.7.attention.q"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Formats, BindLinear,
                         ::testing::Values(testing::f32_format(), testing::bf16_format(),
                                           affine_format(4, 32), affine_format(4, 0, true),
                                           affine_format(8, 64, false, DType::kF32),
                                           affine_format(8, 128, true), affine_format(2, 16),
                                           affine_format(3, 32), affine_format(5, 64, true),
                                           affine_format(6, 0),
                                           affine_format(4, 16, true, DType::kI8),
                                           affine_format(5, 32, false, DType::kI8)));

}  // namespace
}  // namespace fq::quant
