// A short, seeded run of what tests/fuzz does at length: random damage to valid files must give a
// value that keeps its promises or an Error. Most useful under AddressSanitizer and
// UndefinedBehaviorSanitizer.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tests/engine/model/editable_model.h"
#include "tests/fuzz/targets.h"

namespace fq::model {
namespace {

using testing::EditableModel;
using testing::TinyModelOptions;
using testing::WeightFile;

// Bytes and words that mean something to the readers.
constexpr std::string_view kWords[] = {"{",
                                       "}",
                                       "[",
                                       "]",
                                       ",",
                                       ":",
                                       "\"",
                                       "-1",
                                       "0",
                                       "1e400",
                                       "null",
                                       "true",
                                       "\\u0000",
                                       "\"F32\"",
                                       "\"pad.0\"",
                                       "18446744073709551615",
                                       "9223372036854775808",
                                       "..",
                                       "/"};

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  size_t below(size_t limit) { return limit == 0 ? 0 : random_() % limit; }

  // One to four edits inside the first `reach` bytes.
  std::string damage(std::string text, size_t reach) {
    for (size_t edits = 1 + below(4); edits > 0; --edits) {
      const size_t at = below(std::min(reach, text.size()));
      const size_t rest = text.size() - at;
      switch (below(6)) {
        case 0:
          text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
          break;
        case 1:
          text[at] = static_cast<char>(random_());
          break;
        case 2:
          text.erase(at, below(std::min<size_t>(rest, 40)));
          break;
        case 3:
          text.insert(at, text.substr(below(text.size()), below(40)));
          break;
        case 4:
          text.insert(at, kWords[below(std::size(kWords))]);
          break;
        // A digit for a digit: the document stays JSON, so that the deeper checks get their turn.
        case 5: {
          const size_t digit = text.find_first_of("0123456789", at);
          if (digit != std::string::npos) text[digit] = static_cast<char>('0' + below(10));
        }
      }
      if (text.empty()) text = "{";
    }
    return text;
  }

 private:
  std::mt19937 random_;
};

TinyModelOptions small_options() {
  TinyModelOptions options;
  options.layers = 1;
  options.hidden = options.mlp_hidden = 32;
  options.vocab = 16;
  options.vision = true;
  options.vision_layers = 1;
  return options;
}

TEST(Mutations, OfConfigsNeverCrash) {
  const EditableModel model(small_options());
  const std::string valid = model.config.dump();
  ASSERT_TRUE(fuzz::check_spec(valid));
  Mutator mutator(20240601);
  int accepted = 0;
  constexpr int kRounds = 3000;
  for (int round = 0; round < kRounds; ++round) {
    accepted += fuzz::check_spec(mutator.damage(valid, valid.size())) ? 1 : 0;
  }
  // Some damage is harmless (a name, a float), most is not: both paths must have run.
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, kRounds / 2);
}

TEST(Mutations, OfWeightFilesNeverCrash) {
  const EditableModel model(small_options());
  const std::string valid = testing::read_file(model.path(EditableModel::kWeights));
  uint64_t header = 0;
  std::memcpy(&header, valid.data(), 8);
  ASSERT_TRUE(fuzz::check_safetensors(std::as_bytes(std::span(valid))));
  Mutator mutator(20240602);
  int accepted = 0;
  constexpr int kRounds = 2000;
  for (int round = 0; round < kRounds; ++round) {
    // Only a copy that ends where the file ends lets AddressSanitizer see a read past it.
    const std::string damaged = mutator.damage(valid, 8 + header);
    const std::vector<char> exact(damaged.begin(), damaged.end());
    accepted += fuzz::check_safetensors(std::as_bytes(std::span(exact))) ? 1 : 0;
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, kRounds / 2);
}

TEST(Mutations, OfDirectoriesNeverCrash) {
  EditableModel model(small_options());
  const std::string config = model.config.dump();
  const std::string weights = testing::read_file(model.path(EditableModel::kWeights));
  uint64_t header = 0;
  std::memcpy(&header, weights.data(), 8);
  Mutator mutator(20240603);
  [[maybe_unused]] volatile int last_bytes = 0;  // read through the mapping
  for (int round = 0; round < 200; ++round) {
    const bool damage_config = round % 2 == 0;
    testing::write_file(model.path("config.json"),
                        damage_config ? mutator.damage(config, config.size()) : config);
    if (!damage_config) {
      // The entry in the config follows the damage, so that the size check does not hide the rest.
      const nlohmann::json before = model.config;
      model.replace(EditableModel::kWeights, mutator.damage(weights, 8 + header));
      testing::write_file(model.path("config.json"), model.config.dump());
      model.config = before;
    } else {
      testing::write_file(model.path(EditableModel::kWeights), weights);
    }
    const auto opened = ModelDirectory::open(model.path("."), round % 3 == 0);
    if (!opened) {
      EXPECT_FALSE(opened.error().message.empty());
      continue;
    }
    for (const auto& [name, tensor] : (*opened)->tensors()) {
      if (!tensor.bytes.empty()) last_bytes = std::to_integer<int>(tensor.bytes.back());
    }
  }
}

}  // namespace
}  // namespace fq::model
