// Sums of weights over rows: against the weights themselves, added in float64, and through the
// model directory, where they may be stored or not.
#include "src/quant/row_sums.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "src/backend/backend.h"
#include "src/blocks/layers.h"
#include "tests/engine/backend/linear_problem.h"
#include "tests/engine/model/editable_model.h"

namespace fq::quant {
namespace {

using backend::affine_formats;
using testing::EditableModel;

std::vector<float> all_row_sums(const LinearWeights& w) {
  std::vector<float> sums(static_cast<size_t>(w.tiles) * kTileRows, -1.0f);
  for (int tile = 0; tile < w.tiles; ++tile) {
    row_sums_of_tile(w, tile, sums.data() + tile * kTileRows);
  }
  return sums;
}

// A weight in float32 is rounded by at most u |code - zero| scale, with offset by u of the product
// and of the sum; the sum is rounded once.
TEST(RowSums, AreTheFloat64SumsOfTheWeights) {
  for (const model::WeightFormat& format : affine_formats()) {
    for (const auto& [out, in] : {std::pair{1, 1}, {21, 15}, {16, 16}, {24, 47}, {40, 1100}}) {
      SCOPED_TRACE(::testing::Message() << format.name() << " out " << out << " in " << in);
      const backend::Problem problem(format, out, in, 1, false, false);
      const LinearWeights& w = problem.packed.view;
      const std::vector<float> sums = all_row_sums(w);
      for (int row = 0; row < out; ++row) {
        double want = 0.0, size = 0.0;
        for (int i = 0; i < in; ++i) {
          const double weight = weight_at(w, row, i);
          want += weight;
          size += std::fabs(weight);
          if (w.offsets != nullptr) {
            size += double{group_scale(w, row, i / w.group)} * weight_code_at(w, row, i);
          }
        }
        ASSERT_NEAR(sums[static_cast<size_t>(row)], want, 0x1p-24 * (size + std::fabs(want)))
            << "row " << row;
      }
      for (size_t row = static_cast<size_t>(out); row < sums.size(); ++row) {
        ASSERT_EQ(sums[row], 0.0f) << "padding row " << row;
      }
    }
  }
}

// What lies behind the last input is nobody's business.
TEST(RowSums, PaddingInputsAreNotRead) {
  for (const int bits : {3, 8}) {
    backend::Problem problem({model::WeightFormat::Kind::kAffine, bits, 32}, 16, 40, 1, false,
                             false);
    const std::vector<float> before = all_row_sums(problem.packed.view);
    // A tile's second superblock: the words of inputs 8 and up, in each plane.
    auto* const codes = reinterpret_cast<uint8_t*>(problem.packed.data.data());
    const Planes planes = planes_of(bits);
    for (int tile = 0; tile < problem.packed.view.tiles; ++tile) {
      uint8_t* plane_codes = codes + (tile * 2 + 1) * bits * kTileRows * 4;
      for (int p = 0; p < planes.count; ++p) {
        for (int input = 8; input < kInputPadding; ++input) {
          const PlaneBit at = plane_bit(planes.plane[p], input);
          for (int row = 0; row < kTileRows; ++row) {
            uint8_t& byte = plane_codes[(at.block * kTileRows + row) * 4 + at.byte];
            byte = static_cast<uint8_t>(byte ^ ((1 << planes.plane[p].bits) - 1) << at.bit);
          }
        }
        plane_codes += planes.plane[p].blocks * kTileRows * 4;
      }
    }
    EXPECT_EQ(all_row_sums(problem.packed.view), before);
  }
}

// Directories ----------------------------------------------------------------------------------

constexpr const char* kSlot = "decoder.layers.0.mlp.up";

// One linear has inputs with a zero.
struct AsymmetricModel : EditableModel {
  AsymmetricModel() {
    config["linears"][kSlot]["activations"] = {{"bits", 8}, {"symmetric", false}};
  }
};

void store(EditableModel& model, const std::vector<float>& sums) {
  model.edit_weights([&](testing::WeightFile& file) {
    const size_t begin = file.data.size(), bytes = sums.size() * sizeof(float);
    file.header[std::string(kSlot) + ".row_sums"] = {
        {"dtype", "F32"},
        {"shape", {static_cast<int64_t>(sums.size()) / kTileRows, kTileRows}},
        {"data_offsets", {begin, begin + bytes}}};
    file.data.append(reinterpret_cast<const char*>(sums.data()), bytes);
    const size_t pad = (64 - file.data.size() % 64) % 64;
    if (pad == 0) return;
    file.header["pad.sums"] = {
        {"dtype", "U8"}, {"shape", {pad}}, {"data_offsets", {begin + bytes, begin + bytes + pad}}};
    file.data += std::string(pad, 0);
  });
}

// The sums that a linear has once it is bound.
std::vector<float> bound_sums(const model::ModelDirectory& directory, bool exact = false) {
  const auto backend = backend::make_cpu_backend("");
  EXPECT_TRUE(backend);
  ThreadPool pool(2);
  const blocks::Binder binder{directory, **backend, pool, std::nullopt, exact};
  const auto linear = blocks::Linear::bind(binder, kSlot, false);
  EXPECT_TRUE(linear) << linear.error().to_string();
  const LinearWeights& w = linear->weights();
  if (w.row_sums == nullptr) return {};
  return {w.row_sums, w.row_sums + w.tiles * kTileRows};
}

TEST(RowSums, OfADirectoryAreTakenAsTheyAre) {
  AsymmetricModel model;
  std::vector<float> stored(96);
  for (size_t i = 0; i < stored.size(); ++i) stored[i] = static_cast<float>(i) + 0.25f;
  store(model, stored);
  const auto opened = model.open(true);
  ASSERT_TRUE(opened) << opened.error().to_string();
  EXPECT_EQ(bound_sums(**opened), stored);
}

TEST(RowSums, OfADirectoryWithoutThemAreComputed) {
  const AsymmetricModel model;
  const auto opened = model.open(true);
  ASSERT_TRUE(opened) << opened.error().to_string();
  const auto weights = bind_linear(**opened, kSlot, false);
  ASSERT_TRUE(weights);
  EXPECT_EQ(weights->row_sums, nullptr);
  EXPECT_EQ(bound_sums(**opened), all_row_sums(*weights));
  EXPECT_TRUE(bound_sums(**opened, true).empty());  // dequantized inputs need none
}

TEST(RowSums, OfTheWrongTypeOrSizeAreRefused) {
  const auto refused = [](const std::function<void(nlohmann::json&)>& change, size_t count = 96) {
    AsymmetricModel model;
    store(model, std::vector<float>(count, 1.0f));
    model.edit_weights(
        [&](testing::WeightFile& file) { change(file.header[std::string(kSlot) + ".row_sums"]); });
    const auto opened = model.open();
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::kCorruptModel);
    EXPECT_NE(opened.error().message.find("mlp.up.row_sums\" is"), std::string::npos)
        << opened.error().message;
    EXPECT_NE(opened.error().message.find("needs F32 [12, 8]"), std::string::npos);
  };
  refused([](nlohmann::json& entry) { entry["dtype"] = "I32"; });
  refused([](nlohmann::json& entry) { entry["shape"] = {96}; });
  refused([](nlohmann::json&) {}, 80);
}

TEST(RowSums, WhereInputsHaveNoZeroAreRefused) {
  AsymmetricModel model;
  store(model, std::vector<float>(96, 1.0f));
  ASSERT_TRUE(model.open());
  model.config["linears"][kSlot]["activations"]["symmetric"] = true;
  const auto opened = model.open();
  ASSERT_FALSE(opened);
  EXPECT_NE(opened.error().message.find("nothing uses tensor"), std::string::npos)
      << opened.error().message;
}

TEST(RowSums, ThatAreNotFiniteAreFoundWithTheChecksums) {
  AsymmetricModel model;
  std::vector<float> stored(96, 1.0f);
  stored.back() = std::numeric_limits<float>::infinity();
  store(model, stored);
  EXPECT_TRUE(model.open(false));
  EXPECT_FALSE(model.open(true));
}

}  // namespace
}  // namespace fq::quant
