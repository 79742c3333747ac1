// Patches and pooling against golden vectors and small cases done by hand.
#include "src/ops/visual.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "tests/engine/quant/golden.h"

namespace fq::ops {
namespace {

using model::PoolMode;

TEST(PoolGrid, EqualsThePublishedModelsPooling) {
  SKIP_WITHOUT_GOLDEN_FILE("framefusion/vision_units.safetensors");
  const testing::GoldenTensors golden("framefusion/vision_units.safetensors");
  const int grid = 27, width = 4, stride = 2;
  for (const auto& [name, mode, side] : {std::tuple{"pool.bilinear", PoolMode::kBilinear, 14},
                                         {"pool.average", PoolMode::kAverage, 13},
                                         {"pool.max", PoolMode::kMax, 13}}) {
    ASSERT_EQ(pooled_side(grid, mode, stride), side);
    std::vector<float> out(static_cast<size_t>(side * side * width));
    for (int frame = 0; frame < 2; ++frame) {
      pool_grid(golden.floats("pool.input_729") + frame * grid * grid * width, grid, width, mode,
                stride, out.data());
      const float* const want = golden.floats(name) + frame * side * side * width;
      for (size_t i = 0; i < out.size(); ++i) {
        // Weighted means of four values below 5: 8 roundings; bilinear weights carry two roundings
        // of a coordinate below 27, times differences of at most 10.
        const double bound = mode == PoolMode::kBilinear  ? (2 * 27 * 10 + 40) * 0x1p-24
                             : mode == PoolMode::kAverage ? 40 * 0x1p-24
                                                          : 0.0;
        ASSERT_NEAR(out[i], want[i], bound) << name << " element " << i;
      }
    }
  }
}

TEST(PoolGrid, NoneCopies) {
  std::vector<float> in(3 * 3 * 2), out(in.size());
  std::iota(in.begin(), in.end(), 0.0f);
  EXPECT_EQ(pooled_side(3, PoolMode::kNone, 2), 3);
  pool_grid(in.data(), 3, 2, PoolMode::kNone, 2, out.data());
  EXPECT_EQ(out, in);
}

TEST(ResizeBilinear, SameSizeIsIdentityAndUpscalingClampsAtTheBorder) {
  const std::vector<float> in = {0, 10, 20, 30};
  std::vector<float> same(4), twice(16);
  resize_bilinear(in.data(), 2, 2, 1, 2, 2, same.data());
  EXPECT_EQ(same, in);
  resize_bilinear(in.data(), 2, 2, 1, 4, 4, twice.data());
  const std::vector<float> want = {0,  2.5,  7.5,  10, 5,  7.5,  12.5, 15,
                                   15, 17.5, 22.5, 25, 20, 22.5, 27.5, 30};
  EXPECT_EQ(twice, want);
}

TEST(ResizeBilinear, HandlesUnequalSides) {
  const std::vector<float> in = {1, 2, 3, 4, 5, 6};  // 2 x 3
  std::vector<float> out(3);
  resize_bilinear(in.data(), 2, 3, 1, 1, 3, out.data());
  EXPECT_EQ(out, (std::vector<float>{2.5, 3.5, 4.5}));
}

TEST(Patchify, OrdersChannelThenRowThenColumn) {
  // Pixel value = 100 channel + 10 y + x.
  std::vector<float> image;
  for (int c = 0; c < 2; ++c) {
    for (int y = 0; y < 4; ++y) {
      for (int x = 0; x < 4; ++x) image.push_back(static_cast<float>(100 * c + 10 * y + x));
    }
  }
  std::vector<float> columns(4 * 8);
  patchify(image.data(), 2, 4, 2, columns.data());
  const std::vector<float> want = {0,   1,   10,  11,  100, 101, 110, 111, 2,   3,   12,
                                   13,  102, 103, 112, 113, 20,  21,  30,  31,  120, 121,
                                   130, 131, 22,  23,  32,  33,  122, 123, 132, 133};
  EXPECT_EQ(columns, want);
}

TEST(Patchify, LeavesOutABorderThatIsNoPatch) {
  const std::vector<float> image(5 * 5, 1.0f);
  std::vector<float> columns(5 * 4, -1.0f);
  patchify(image.data(), 1, 5, 2, columns.data());
  EXPECT_EQ(columns[15], 1.0f);
  EXPECT_EQ(columns[16], -1.0f);  // four patches only
}

}  // namespace
}  // namespace fq::ops
