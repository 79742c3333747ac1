// Opening model directories: valid ones of every format, and ones that were damaged on the way.
#include "src/model/directory.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "framequilt/model.h"
#include "tests/engine/model/editable_model.h"

namespace fq::model {
namespace {

using nlohmann::json;
using testing::EditableModel;
using testing::TinyModelOptions;
using testing::WeightFile;

TinyModelOptions vision_options() {
  TinyModelOptions options;
  options.vision = true;
  return options;
}

// Opening fails with `code` and a message that contains `part`.
void expect_refused(const EditableModel& model, Code code, const std::string& part,
                    bool verify_checksums = false) {
  const auto opened = model.open(verify_checksums);
  ASSERT_FALSE(opened) << "accepted, expected: " << part;
  EXPECT_EQ(opened.error().code, code) << opened.error().to_string();
  EXPECT_NE(opened.error().message.find(part), std::string::npos) << opened.error().message;
}

std::vector<TinyModelOptions> shapes() {
  std::vector<TinyModelOptions> result;
  for (const WeightFormat& format :
       {testing::f32_format(), testing::bf16_format(), testing::affine_format(4, 32),
        testing::affine_format(4, 128, true), testing::affine_format(8, 0),
        testing::affine_format(8, 64, false, DType::kF32)}) {
    TinyModelOptions options = vision_options();
    options.format = format;
    result.push_back(options);
  }
  TinyModelOptions odd;  // nothing is a multiple of anything
  odd.hidden = 50;
  odd.heads = odd.kv_heads = 3;
  odd.head_dim = 10;
  odd.mlp_hidden = 33;
  odd.vocab = 101;
  odd.tied_embedding = false;
  odd.norm = "layer";
  odd.mlp = "plain";
  odd.activation = "relu";
  odd.output_bias = odd.mlp_bias = true;
  odd.files = 3;
  result.push_back(odd);
  TinyModelOptions plain = vision_options();
  plain.newline = "none";
  plain.image_newline = plain.patch_bias = false;
  plain.post_norm = true;
  plain.vision_norm = "rms";
  plain.bos = 1;
  plain.add_bos = true;
  plain.chat_template = "{{ messages }}";
  result.push_back(plain);
  return result;
}

TEST(ModelDirectory, OpensWhatTheBuilderWrites) {
  for (const TinyModelOptions& options : shapes()) {
    const EditableModel model(options);
    const auto opened = model.open(true);
    ASSERT_TRUE(opened) << opened.error().to_string();
    const ModelDirectory& directory = **opened;
    EXPECT_EQ(directory.spec().weights, options.format.name());
    uint64_t bytes = 0;
    for (const auto& [name, tensor] : directory.tensors()) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.bytes.data()) % 64, 0u) << name;
      EXPECT_FALSE(name.starts_with("pad."));
      bytes += tensor.bytes.size();
    }
    EXPECT_EQ(directory.weight_bytes(), bytes);
  }
}

TEST(ModelDirectory, VectorsAreTheOnesWritten) {
  const testing::TempDir path;
  const auto written = testing::write_tiny_model(path.path(), vision_options());
  const auto opened = ModelDirectory::open(path.path(), false);
  ASSERT_TRUE(opened) << opened.error().to_string();
  for (const char* name : {"decoder.final_norm.weight", "decoder.layers.1.attention.q.bias",
                           "vision.position", "visual.newline", "projector.layers.1.bias"}) {
    const TensorView* tensor = (*opened)->find(name);
    ASSERT_NE(tensor, nullptr) << name;
    const std::vector<float>& expected = written.values.at(name);
    ASSERT_EQ(static_cast<size_t>(tensor->elements()), expected.size());
    EXPECT_EQ(std::memcmp(tensor->f32(), expected.data(), expected.size() * 4), 0) << name;
  }
  EXPECT_EQ((*opened)->find("decoder.head.weight"), nullptr);
}

TEST(Model, OpensThroughThePublicHeaderAndOutlivesNothing) {
  const testing::TempDir path;
  testing::write_tiny_model(path.path(), {});
  const auto model = Model::open(path.path(), {.verify_checksums = true});
  ASSERT_TRUE(model) << model.error().to_string();
  EXPECT_EQ((*model)->directory().spec().name, "tiny");
  EXPECT_EQ((*model)->directory().path(), path.path());
}

TEST(ModelDirectory, WhatIsNotThereIsNotFoundWithAHint) {
  const testing::TempDir path;
  testing::write_file(path / "file", "x");
  for (const auto& place : {path.path(), path / "missing", path / "file"}) {
    const auto opened = ModelDirectory::open(place, false);
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::kNotFound);
    EXPECT_FALSE(opened.error().hint.empty());
  }
}

TEST(ModelDirectory, EveryTensorMustBeThere) {
  EditableModel model(vision_options());
  const std::string original = testing::read_file(model.path(EditableModel::kWeights));
  const WeightFile valid = WeightFile::split(original);
  int removed = 0;
  for (const auto& item : valid.header.items()) {
    if (item.key().starts_with("pad.")) continue;
    WeightFile file = valid;
    json entry = item.value();
    file.header.erase(item.key());
    file.header["pad.x"] = entry;  // pads are ignored, so the file stays gap-free
    model.replace(EditableModel::kWeights, file.join());
    expect_refused(model, Code::kCorruptModel, "tensor \"" + item.key() + "\" is missing");
    ++removed;
  }
  EXPECT_GT(removed, 100);
}

TEST(ModelDirectory, NoTensorMayBeThereThatNothingUses) {
  EditableModel model;
  model.edit_weights([](WeightFile& file) {
    file.header["decoder.layers.2.attention_norm.weight"] = {
        {"dtype", "F32"},
        {"shape", {16}},
        {"data_offsets", {file.data.size(), file.data.size() + 64}}};
    file.data += std::string(64, 0);
  });
  expect_refused(model, Code::kCorruptModel,
                 "nothing uses tensor \"decoder.layers.2.attention_norm.weight\"");
}

TEST(ModelDirectory, DtypesAndShapesAreTheDescriptions) {
  EditableModel model;
  model.edit_weights([](WeightFile& file) {
    file.header["decoder.final_norm.weight"]["shape"] = {8, 8};
  });
  expect_refused(model, Code::kCorruptModel,
                 "\"decoder.final_norm.weight\" is F32 [8, 8], the description needs F32 [64]");

  EditableModel other;
  other.edit_weights(
      [](WeightFile& file) { file.header["decoder.final_norm.weight"]["dtype"] = "I32"; });
  expect_refused(other, Code::kCorruptModel, "is I32 [64], the description needs F32 [64]");

  // A group size that the stored scales do not have.
  EditableModel group;
  group.config["linears"]["decoder.layers.0.mlp.down"]["format"]["group"] = 64;
  expect_refused(group, Code::kCorruptModel, "\"decoder.layers.0.mlp.down.scales\" is F16");
}

TEST(ModelDirectory, TensorsStartAtMultiplesOf64Bytes) {
  EditableModel model;
  // The same file with four spaces more in the header: valid safetensors, but every tensor has
  // moved.
  const WeightFile file =
      WeightFile::split(testing::read_file(model.path(EditableModel::kWeights)));
  std::string bytes = file.join();
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  bytes.insert(8 + length, 4, ' ');
  length += 4;
  std::memcpy(bytes.data(), &length, 8);
  model.replace(EditableModel::kWeights, bytes);
  expect_refused(model, Code::kCorruptModel, "does not start at a multiple of 64 bytes");
}

TEST(ModelDirectory, ATensorInTwoFilesIsRefused) {
  TinyModelOptions options;
  options.files = 2;
  EditableModel model(options);
  const char* kSecond = "model-00002-of-00002.safetensors";
  model.replace(kSecond, testing::read_file(model.path("model-00001-of-00002.safetensors")));
  expect_refused(model, Code::kCorruptModel, "is in another file too");
}

TEST(ModelDirectory, FilesThatAreMissingOrOfAnotherSizeAreRefused) {
  EditableModel model;
  const std::string weights = testing::read_file(model.path(EditableModel::kWeights));
  for (const size_t length : {size_t{0}, size_t{7}, size_t{8}, size_t{64}, weights.size() - 1}) {
    testing::write_file(model.path(EditableModel::kWeights), weights.substr(0, length));
    expect_refused(model, Code::kCorruptModel,
                   "config.json says " + std::to_string(weights.size()));
  }
  // Truncated together with its entry: the container itself must notice.
  for (const size_t length : {size_t{0}, size_t{7}, size_t{8}, size_t{64}, weights.size() - 1}) {
    model.replace(EditableModel::kWeights, weights.substr(0, length));
    EXPECT_FALSE(model.open());
  }
  model.replace(EditableModel::kWeights, weights);
  EXPECT_TRUE(model.open());
  std::filesystem::remove(model.path("tokenizer.json"));
  expect_refused(model, Code::kCorruptModel, "tokenizer.json' is missing, config.json lists it");
  std::filesystem::create_directory(model.path("tokenizer.json"));
  expect_refused(model, Code::kIo, "not a regular file");
}

TEST(ModelDirectory, ChecksumsAreComparedWhenAskedFor) {
  EditableModel model;
  for (const char* name : {EditableModel::kWeights, "tokenizer.json"}) {
    const std::string bytes = testing::read_file(model.path(name));
    std::string flipped = bytes;
    flipped.back() = static_cast<char>(flipped.back() ^ 1);
    testing::write_file(model.path(name), flipped);
    EXPECT_TRUE(model.open(false));
    expect_refused(model, Code::kCorruptModel, "SHA-256", true);
    testing::write_file(model.path(name), bytes);
  }
  EXPECT_TRUE(model.open(true));
}

TEST(ModelDirectory, NumbersThatAreNotFiniteAreFoundWithTheChecksums) {
  // Infinity in each floating-point type, at the last element, which a sloppy loop would miss.
  struct Case {
    WeightFormat format;
    const char* tensor;
    std::string infinity;
  };
  const std::vector<Case> cases = {
      {testing::affine_format(4, 32), "decoder.embedding.scales", std::string("\x00\x7c", 2)},
      {testing::bf16_format(), "decoder.embedding.weight", std::string("\x80\xff", 2)},
      {testing::f32_format(), "decoder.final_norm.weight", std::string("\x01\x00\x80\x7f", 4)}};
  for (const Case& c : cases) {
    TinyModelOptions options;
    options.format = c.format;
    EditableModel model(options);
    model.edit_weights([&c](WeightFile& file) {
      const size_t end = file.header[c.tensor]["data_offsets"][1];
      file.data.replace(end - c.infinity.size(), c.infinity.size(), c.infinity);
    });
    EXPECT_TRUE(model.open(false));
    expect_refused(model, Code::kCorruptModel,
                   "tensor \"" + std::string(c.tensor) + "\" holds infinity or NaN", true);
  }
}

TEST(ModelDirectory, AConfigThatIsTooLargeIsNotRead) {
  const EditableModel model;
  testing::write_file(model.path("config.json"), std::string((16 << 20) + 1, ' '));
  const auto opened = ModelDirectory::open(model.path("."), false);
  ASSERT_FALSE(opened);
  EXPECT_NE(opened.error().message.find("at most 16777216 are read"), std::string::npos);
}

TEST(ModelDirectory, AnotherVersionIsAMismatch) {
  EditableModel model;
  model.config["version"] = 2;
  expect_refused(model, Code::kVersionMismatch, "version 2");
}

TEST(ModelDirectory, FilesThatConfigDoesNotListAreIgnored) {
  const EditableModel model;
  testing::write_file(model.path("notes.txt"), "hello");
  testing::write_file(model.path("other.safetensors"), "not one");
  EXPECT_TRUE(model.open(true));
}

}  // namespace
}  // namespace fq::model
