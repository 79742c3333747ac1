// KV number formats: the affine primitive against the reference's own output, bounds, and the page
// layout.
#include "src/quant/kv_format.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <tuple>
#include <vector>

#include "src/core/aligned.h"
#include "src/quant/number.h"
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

TEST(KvParams, FollowTheReferenceWhereItsRangeHasZero) {
  // Float32 scales: the published quantizer's own scale, zero and codes wherever its range holds
  // zero. Half scales: codes of that scale rounded up, so they differ from it by what the scale
  // differs, at most 2^-10 of 2^b - 1 steps, and by one rounding of code and of zero each.
  SKIP_WITHOUT_GOLDEN_FILE("quantization/kv_fp32.safetensors");
  const testing::GoldenTensors inputs("quantization/inputs.safetensors");
  const testing::GoldenTensors golden("quantization/kv_fp32.safetensors");
  const auto manifest = testing::golden_manifest("quantization/manifest.json");
  int compared = 0, equal = 0;
  for (const auto& [name, info] : manifest["files"]["kv_fp32.safetensors"]["cases"].items()) {
    const int bits = info["bits"], group = info["group_size"];
    if (bits > 8) continue;
    const model::TensorView& x = inputs[name.starts_with("key") ? "key" : "value"];
    const auto* const codes = reinterpret_cast<const uint8_t*>(golden[name + ".q"].bytes.data());
    const auto* const zeros = reinterpret_cast<const uint8_t*>(golden[name + ".zero"].bytes.data());
    for (int64_t begin = 0; begin < x.elements(); begin += group) {
      const float* const values = x.f32() + begin;
      const auto [low, high] = std::minmax_element(values, values + group);
      if (*low > 0 || *high < 0) continue;
      const AffineParams exact = kv_params(values, group, bits, /*scale32=*/true);
      ASSERT_EQ(exact.scale, golden.floats(name + ".scale")[begin / group]) << name;
      ASSERT_EQ(exact.zero, zeros[begin / group]) << name;
      const AffineParams half = kv_params(values, group, bits, /*scale32=*/false);
      for (int64_t i = 0; i < group; ++i) {
        ASSERT_EQ(affine_code(values[i], exact, bits), codes[begin + i]) << name;
        const int code = affine_code(values[i], half, bits);
        ASSERT_LE(std::abs(code - codes[begin + i]), 2) << name;
        equal += code == codes[begin + i];
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 10000);
  EXPECT_GT(equal, compared * 9 / 10);
}

TEST(KvParams, ErrorIsAtMostHalfAStepOfTheStoredScale) {
  std::mt19937 random(3);
  for (const bool scale32 : {false, true}) {
    for (const int bits : {8, 6, 4, 3, 2}) {
      for (int trial = 0; trial < 2000; ++trial) {
        std::normal_distribution<float> normal(static_cast<float>(trial % 7) - 3.0f,
                                               std::exp2(static_cast<float>(trial % 30) - 20.0f));
        std::vector<float> x(64);
        for (float& value : x) value = normal(random);
        if (trial % 3 == 0) x[5] *= 100.0f;
        const AffineParams p = kv_params(x.data(), 64, bits, scale32);
        if (!scale32) {
          ASSERT_EQ(float_from_half(half_from_float(p.scale)), p.scale);
        }
        ASSERT_EQ(p.zero, std::floor(p.zero));
        for (const float value : x) {
          const float back = (static_cast<float>(affine_code(value, p, bits)) - p.zero) * p.scale;
          // x / scale is at most 2^b - 1 and rounded once: 2^b 2^-24 of a step.
          ASSERT_LE(std::fabs(back - value), p.scale * (0.5f + 256.0f * 0x1p-22f))
              << "bits " << bits << " trial " << trial;
        }
      }
    }
  }
}

TEST(KvParams, ScalesAreRoundedUpAndStayFinite) {
  for (const float range : {0.0f, 1e-6f, 1e-4f, 0.1f, 1.0f, 123.456f, 1e5f}) {
    for (const int bits : {8, 2}) {
      const float exact = kv_scale(range, bits, true), stored = kv_scale(range, bits, false);
      EXPECT_GE(stored, exact);
      // A unit in the last place of half: 2^-10, or 2^-24 below its normal numbers.
      EXPECT_LE(stored, exact * (1.0f + 0x1p-10f) + 0x1p-24f);
    }
  }
  EXPECT_EQ(kv_scale(3e38f, 2, false), 65504.0f);
}

TEST(KvFormat, NamesAreParsedAndOthersRefused) {
  const std::tuple<const char*, KvFormat> good[] = {
      {"kv32", {.k_bits = 32, .v_bits = 32}},
      {"kv16", {}},
      {"kv8", {.k_bits = 8, .v_bits = 8}},
      {"kv6", {.k_bits = 6, .v_bits = 6}},
      {"kv3", {.k_bits = 3, .v_bits = 3}},
      {"kv2g16", {.k_bits = 2, .v_bits = 2, .group = 16}},
      {"k8v4", {.k_bits = 8, .v_bits = 4}},
      {"k16v2g128", {.k_bits = 16, .v_bits = 2, .group = 128}},
      {"kv4g32+ends16", {.k_bits = 4, .v_bits = 4, .group = 32, .ends16 = true}},
      {"kv32+rotate", {.k_bits = 32, .v_bits = 32, .rotate = true}},
      {"kv4+ends16+rotate+scale32",
       {.k_bits = 4, .v_bits = 4, .ends16 = true, .rotate = true, .scale32 = true}},
  };
  for (const auto& [name, want] : good) {
    const auto format = parse_kv_format(name);
    ASSERT_TRUE(format) << name;
    EXPECT_EQ(*format, want) << name;
    EXPECT_EQ(format->name(), name);
  }
  // Other spellings of the same format have its one name.
  EXPECT_EQ(parse_kv_format("k8v8")->name(), "kv8");
  EXPECT_EQ(parse_kv_format("kv3+rotate+ends16")->name(), "kv3+ends16+rotate");
  for (const char* name :
       {"",        "kv",        "kv5",          "kv08",        "KV8",         "kv8 ",
        "k8",      "k8v",       "v4k8",         "kv16g32",     "kv8g",        "kv8g0",
        "kv8g48",  "kv8+",      "kv8+ends",     "kv16+ends16", "kv8+ends16+", "kv8+rotate+rotate",
        "kv4g32g", "k16v32g16", "kv32+scale32", "kv8ends16",   "kv8+rotate x"}) {
    const auto format = parse_kv_format(name);
    ASSERT_FALSE(format) << name;
    EXPECT_EQ(format.error().code, Code::kInvalidArgument);
    EXPECT_NE(format.error().hint.find("kv8, kv6, kv4"), std::string::npos);
  }
}

TEST(KvFormat, EndsAreKeptAtSixteenBits) {
  const KvFormat format = *parse_kv_format("k16v3g32+ends16+rotate");
  EXPECT_EQ(format.of_layer(0, 5).name(), "kv16+rotate");
  EXPECT_EQ(format.of_layer(4, 5).name(), "kv16+rotate");
  for (const int layer : {1, 2, 3}) {
    EXPECT_EQ(format.of_layer(layer, 5).name(), "k16v3g32+rotate");
  }
  EXPECT_EQ(parse_kv_format("kv4")->of_layer(0, 5).name(), "kv4");
  EXPECT_EQ(parse_kv_format("k32v4+ends16")->of_layer(0, 5).name(), "k32v16");
}

TEST(KvPageLayout, GroupsFollowTheRule) {
  const auto groups_of = [](int group, int head_dim) {
    return KvPageLayout::make({.k_bits = 8, .v_bits = 8, .group = group}, 2, head_dim)->k.groups;
  };
  EXPECT_EQ(groups_of(0, 64), 1);
  EXPECT_EQ(groups_of(0, 128), 1);
  EXPECT_EQ(groups_of(0, 256), 2);
  EXPECT_EQ(groups_of(0, 192), 1);  // 128 does not divide it
  EXPECT_EQ(groups_of(32, 64), 2);
  EXPECT_EQ(groups_of(64, 80), 1);
  EXPECT_EQ(groups_of(16, 80), 5);
}

TEST(KvPageLayout, BytesAreThoseOfTheContract) {
  const auto bytes = [](const char* name, int head_dim) {
    return KvPageLayout::make(*parse_kv_format(name), 3, head_dim)->page_bytes;
  };
  const size_t params = 2 * 64 * (2 + 1);  // K and V: a half and a byte per token and group
  EXPECT_EQ(bytes("kv32", 64), 3u * 2 * 64 * 64 * 4);
  EXPECT_EQ(bytes("kv16", 64), 3u * 2 * 64 * 64 * 2);
  EXPECT_EQ(bytes("kv8", 64), 3u * (2 * 64 * 64 + params));
  EXPECT_EQ(bytes("kv6", 64), 3u * (2 * 64 * 64 * 6 / 8 + params));
  EXPECT_EQ(bytes("kv4", 64), 3u * (64 * 64 + params));
  EXPECT_EQ(bytes("kv3", 64), 3u * (2 * 64 * 64 * 3 / 8 + params));
  EXPECT_EQ(bytes("kv2", 64), 3u * (2 * 64 * 64 * 2 / 8 + params));
  EXPECT_EQ(bytes("kv2g16", 64), 3u * (2 * 64 * 64 * 2 / 8 + 4 * params));
  EXPECT_EQ(bytes("k8v4", 64), 3u * (64 * 64 * 12 / 8 + params));
  EXPECT_EQ(bytes("kv8+scale32", 64), 3u * (2 * 64 * 64 + 2 * 64 * 5));
  for (const int bits : {32, 16, 8, 6, 4, 3, 2}) {
    for (const int head_dim : {1, 2, 6, 7, 24, 72, 80, 96, 128, 256}) {
      const KvPageLayout l = *KvPageLayout::make({.k_bits = bits, .v_bits = bits}, 2, head_dim);
      for (const KvPart* part : {&l.k, &l.v}) {
        for (const size_t offset : {part->low, part->high, part->scales, part->zeros})
          EXPECT_EQ(offset % 64, 0u);
      }
      EXPECT_EQ(l.head_bytes % 64, 0u);
    }
  }
}

TEST(KvPageLayout, WhatCannotBeStoredIsRefused) {
  const auto code = [](KvFormat format, int heads, int head_dim) {
    return KvPageLayout::make(format, heads, head_dim).error().code;
  };
  EXPECT_EQ(code({.k_bits = 5}, 2, 8), Code::kUnsupported);
  EXPECT_EQ(code({.v_bits = 12}, 2, 8), Code::kUnsupported);
  EXPECT_EQ(code({.k_bits = 4, .group = 24}, 2, 48), Code::kUnsupported);
  EXPECT_EQ(code({}, 0, 8), Code::kUnsupported);
  EXPECT_EQ(code({}, 2, 1025), Code::kUnsupported);
  EXPECT_TRUE(KvPageLayout::make({.k_bits = 4, .v_bits = 2}, 2, 7));
}

TEST(KvPage, ReadsBackWhatTheFormatCanHold) {
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  for (const char* name : {"kv32", "kv16", "kv8", "kv6", "kv4", "kv3", "kv2", "k8v4", "k2v16",
                           "k3v6g16", "kv4+scale32"}) {
    for (const auto& [heads, dims] : {std::pair{1, 64}, {3, 24}, {2, 80}, {2, 256}, {1, 7}}) {
      SCOPED_TRACE(::testing::Message() << name << " " << heads << "x" << dims);
      const KvPageLayout l = *KvPageLayout::make(*parse_kv_format(name), heads, dims);
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
          for (const auto& [part, wrote, read] :
               {std::tuple{&l.k, &k[slot], &k_back}, {&l.v, &v[slot], &v_back}}) {
            const float* const x = wrote->data() + head * dims;
            for (int d = 0; d < dims; ++d) {
              float bound = 0.0f;
              if (part->bits == 16) bound = std::fabs(x[d]) * 0x1p-11f + 0x1p-25f;
              if (part->bits <= 8) {
                const int begin = d / part->group * part->group;
                const bool scale32 = l.format.scale32;
                // Half a step, see KvParams above.
                bound = 0.5001f * kv_params(x + begin, part->group, part->bits, scale32).scale;
              }
              ASSERT_NEAR((*read)[d], x[d], bound) << "slot " << slot << " dim " << d;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fq::quant
