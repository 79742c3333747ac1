// KV number formats: the affine primitive against the reference's own output, bounds, and the page
// layout.
#include "src/quant/kv_format.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "src/core/aligned.h"
#include "tests/engine/quant/golden.h"

namespace fq::quant {
namespace {

TEST(AffinePrimitive, EqualsTheReferenceOnKeysAndValues) {
  SKIP_WITHOUT_GOLDEN_FILE("quantization/kv_fp32.safetensors");
  const testing::GoldenTensors inputs("quantization/inputs.safetensors");
  const testing::GoldenTensors golden("quantization/kv_fp32.safetensors");
  const auto manifest = testing::golden_manifest("quantization/manifest.json");
  int checked = 0;
  for (const auto& [name, info] : manifest["files"]["kv_fp32.safetensors"]["cases"].items()) {
    const int bits = info["bits"], group = info["group_size"];
    ASSERT_FALSE(info["symmetric"]);
    if (bits > 8) continue;
    const model::TensorView& x = inputs[name.starts_with("key") ? "key" : "value"];
    const auto* const codes = reinterpret_cast<const uint8_t*>(golden[name + ".q"].bytes.data());
    const auto* const zeros = reinterpret_cast<const uint8_t*>(golden[name + ".zero"].bytes.data());
    for (int64_t begin = 0; begin < x.elements(); begin += group) {
      const AffineParams p = affine_params(x.f32() + begin, group, bits, /*include_zero=*/false);
      ASSERT_EQ(p.scale, golden.floats(name + ".scale")[begin / group]) << name << " at " << begin;
      ASSERT_EQ(p.zero, zeros[begin / group]) << name << " at " << begin;
      for (int64_t i = begin; i < begin + group; ++i) {
        ASSERT_EQ(affine_code(x.f32()[i], p, bits), codes[i]) << name << " element " << i;
        if (golden.has(name + ".dq")) {  // stored for some cases
          ASSERT_EQ((static_cast<float>(codes[i]) - p.zero) * p.scale,
                    golden.floats(name + ".dq")[i]);
        }
        ++checked;
      }
    }
  }
  EXPECT_GT(checked, 10000);
}

TEST(AffinePrimitive, ErrorIsAtMostAStepWhenTheRangeHasZero) {
  // The zero point is rounded, which can push one end out by half a step beyond the half step of
  // rounding; inside the represented range the error is half a step.
  std::mt19937 random(3);
  for (const int bits : {8, 4}) {
    const float qmax = static_cast<float>((1 << bits) - 1);
    for (int trial = 0; trial < 2000; ++trial) {
      std::normal_distribution<float> normal(static_cast<float>(trial % 7) - 3.0f,
                                             std::exp2(static_cast<float>(trial % 20) - 12.0f));
      std::vector<float> x(64);
      for (float& value : x) value = normal(random);
      if (trial % 3 == 0) x[5] *= 100.0f;
      const AffineParams p = affine_params(x.data(), 64, bits, /*include_zero=*/true);
      for (const float value : x) {
        const float back = (static_cast<float>(affine_code(value, p, bits)) - p.zero) * p.scale;
        const bool inside = value >= -p.zero * p.scale && value <= (qmax - p.zero) * p.scale;
        // 1e-5: float32 rounding of a quotient of at most 255 steps.
        ASSERT_LE(
            std::fabs(back - value),
            (inside ? 0.5f : 1.0f) * p.scale * (1.0f + 1e-5f) * 1.0001f + 255 * p.scale * 0x1p-23f);
      }
    }
  }
}

TEST(AffinePrimitive, ZeroStaysZeroAndConstantsSurviveWithIncludeZero) {
  const std::vector<float> zeros(32, 0.0f);
  const AffineParams p = affine_params(zeros.data(), 32, 8, true);
  EXPECT_EQ(p.scale, 1e-5f / 255.0f);
  EXPECT_EQ((static_cast<float>(affine_code(0.0f, p, 8)) - p.zero) * p.scale, 0.0f);
  for (const float constant : {3.0f, -3.0f, 1e-3f}) {
    const std::vector<float> x(32, constant);
    const AffineParams kept = affine_params(x.data(), 32, 4, true);
    const float back =
        (static_cast<float>(affine_code(constant, kept, 4)) - kept.zero) * kept.scale;
    EXPECT_NEAR(back, constant, std::fabs(constant) * 1e-6f);
    // The reference's range destroys it (specs/quantization 1.1, edge cases).
    const AffineParams lost = affine_params(x.data(), 32, 4, false);
    EXPECT_NEAR(
        std::fabs((static_cast<float>(affine_code(constant, lost, 4)) - lost.zero) * lost.scale),
        1e-5f, 1e-10f);
  }
}

TEST(AffinePrimitive, NotANumberHasACode) {
  const AffineParams p = affine_params(std::vector<float>{1.0f, -1.0f}.data(), 2, 4, true);
  EXPECT_EQ(affine_code(NAN, p, 4), 0);
  EXPECT_EQ(affine_code(INFINITY, p, 4), 15);
  EXPECT_EQ(affine_code(-INFINITY, p, 4), 0);
}

TEST(KvFormat, NamesAreParsedAndOthersRefused) {
  for (const char* name : {"kv32", "kv16", "kv8", "kv4"}) {
    const auto format = parse_kv_format(name);
    ASSERT_TRUE(format);
    EXPECT_EQ(format->name(), name);
  }
  for (const char* name : {"", "kv", "kv3", "kv08", "KV8", "kv8 "}) {
    const auto format = parse_kv_format(name);
    ASSERT_FALSE(format) << name;
    EXPECT_EQ(format.error().code, Code::kInvalidArgument);
    EXPECT_NE(format.error().hint.find("kv32, kv16, kv8, kv4"), std::string::npos);
  }
}

TEST(KvPageLayout, GroupsFollowTheRule) {
  const auto groups_of = [](int group, int head_dim) {
    return KvPageLayout::make({.bits = 8, .group = group}, 2, head_dim)->groups;
  };
  EXPECT_EQ(groups_of(0, 64), 1);
  EXPECT_EQ(groups_of(0, 128), 1);
  EXPECT_EQ(groups_of(0, 256), 2);
  EXPECT_EQ(groups_of(0, 192), 1);  // 128 does not divide it
  EXPECT_EQ(groups_of(32, 64), 2);
  EXPECT_EQ(groups_of(64, 80), 1);
}

TEST(KvPageLayout, BytesAreThoseOfTheContract) {
  const auto bytes = [](int bits, int head_dim) {
    return KvPageLayout::make({.bits = bits}, 3, head_dim)->page_bytes;
  };
  EXPECT_EQ(bytes(32, 64), 3u * 2 * 64 * 64 * 4);
  EXPECT_EQ(bytes(16, 64), 3u * 2 * 64 * 64 * 2);
  EXPECT_EQ(bytes(8, 64), 3u * (2 * 64 * 64 + 4 * 64 * 4));
  EXPECT_EQ(bytes(4, 64), 3u * (64 * 64 + 4 * 64 * 4));
  for (const int bits : {32, 16, 8, 4}) {
    for (const int head_dim : {2, 6, 24, 72, 80, 128, 256}) {
      const KvPageLayout l = *KvPageLayout::make({.bits = bits}, 2, head_dim);
      for (const size_t offset : {l.v_offset, l.k_scale_offset, l.k_zero_offset, l.v_scale_offset,
                                  l.v_zero_offset, l.head_bytes}) {
        EXPECT_EQ(offset % 64, 0u);
      }
    }
  }
}

TEST(KvPageLayout, WhatCannotBeStoredIsRefused) {
  EXPECT_EQ(KvPageLayout::make({.bits = 4}, 2, 7).error().code, Code::kUnsupported);
  EXPECT_EQ(KvPageLayout::make({.bits = 5}, 2, 8).error().code, Code::kUnsupported);
  EXPECT_EQ(KvPageLayout::make({.bits = 8}, 0, 8).error().code, Code::kUnsupported);
  EXPECT_TRUE(KvPageLayout::make({.bits = 8}, 2, 7));
}

TEST(KvPage, ReadsBackWhatTheFormatCanHold) {
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  for (const int bits : {32, 16, 8, 4}) {
    for (const auto& [heads, dims, group] :
         {std::tuple{1, 64, 0}, {3, 24, 0}, {2, 80, 16}, {2, 256, 0}, {1, 2, 0}}) {
      const KvPageLayout l = *KvPageLayout::make({.bits = bits, .group = group}, heads, dims);
      AlignedBuffer<std::byte> page(l.page_bytes);
      std::fill_n(page.data(), l.page_bytes, std::byte{0xAA});
      const size_t width = static_cast<size_t>(heads * dims);
      std::vector<std::vector<float>> k(kPageTokens), v(kPageTokens);
      for (int slot = 0; slot < kPageTokens; ++slot) {
        k[slot].resize(width);
        v[slot].resize(width);
        for (size_t i = 0; i < width; ++i) {
          k[slot][i] = normal(random) * (i % 13 == 0 ? 30.0f : 1.0f);
          v[slot][i] = normal(random);
        }
      }
      // In any order: a slot must not disturb the others.
      for (int i = 0; i < kPageTokens; ++i) {
        const int slot = i * 37 % kPageTokens;
        kv_write_reference(l, page.data(), slot, k[slot].data(), v[slot].data());
      }
      std::vector<float> k_back(static_cast<size_t>(dims)), v_back(static_cast<size_t>(dims));
      for (int slot = 0; slot < kPageTokens; ++slot) {
        for (int head = 0; head < heads; ++head) {
          kv_read_reference(l, page.data(), slot, head, k_back.data(), v_back.data());
          for (const auto& [wrote, read] : {std::pair{&k[slot], &k_back}, {&v[slot], &v_back}}) {
            const float* const x = wrote->data() + head * dims;
            for (int d = 0; d < dims; ++d) {
              float bound = 0.0f;
              if (bits == 16) bound = std::fabs(x[d]) * 0x1p-11f + 0x1p-25f;
              if (bits <= 8) {
                const int begin = d / l.group * l.group;
                // One step: half for rounding, half for the rounded zero point.
                bound = 1.001f * affine_params(x + begin, l.group, bits, true).scale;
              }
              ASSERT_NEAR((*read)[d], x[d], bound)
                  << "bits " << bits << " slot " << slot << " dim " << d;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fq::quant
