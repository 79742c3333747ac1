// A valid tiny model directory that a test then damages: its config as JSON, its weight file as
// header and data.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "src/core/sha256.h"
#include "src/model/directory.h"
#include "tests/engine/testing/model_builder.h"

namespace fq::testing {

// A safetensors file taken apart by the test's own code.
struct WeightFile {
  nlohmann::json header;
  std::string data;

  static WeightFile split(const std::string& file) {
    uint64_t length = 0;
    std::memcpy(&length, file.data(), 8);
    return {nlohmann::json::parse(file.substr(8, length)), file.substr(8 + length)};
  }
  std::string join() const { return join(header.dump()); }
  std::string join(std::string text) const {
    text.append((64 - (text.size() + 8) % 64) % 64, ' ');
    std::string file(8, 0);
    const uint64_t length = text.size();
    std::memcpy(file.data(), &length, 8);
    return file + text + data;
  }
};

class EditableModel {
 public:
  static constexpr const char* kWeights = "model-00001-of-00001.safetensors";

  explicit EditableModel(const TinyModelOptions& options = {})
      : config(write_tiny_model(directory_.path(), options).config) {}

  // Writes the config and opens.
  Result<std::unique_ptr<const model::ModelDirectory>> open(bool verify_checksums = false) const {
    write_file(directory_ / "config.json", config.dump());
    return model::ModelDirectory::open(directory_.path(), verify_checksums);
  }
  // Replaces a listed file and tells the config about it.
  void replace(const std::string& name, const std::string& bytes) {
    write_file(directory_ / name, bytes);
    for (auto& file : config["files"]) {
      if (file["name"] != name) continue;
      file["bytes"] = bytes.size();
      file["sha256"] = sha256_hex(std::as_bytes(std::span(bytes)));
    }
  }
  void edit_weights(const std::function<void(WeightFile&)>& edit) {
    WeightFile file = WeightFile::split(read_file(directory_ / kWeights));
    edit(file);
    replace(kWeights, file.join());
  }
  std::filesystem::path path(const std::string& name) const { return directory_ / name; }

 private:
  TempDir directory_;

 public:
  nlohmann::json config;
};

}  // namespace fq::testing
