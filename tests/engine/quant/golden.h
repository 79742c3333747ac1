// Numeric vectors under $FRAMEQUILT_SHARED/golden (default: ../shared), read through the engine's
// own parser.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "src/core/mapped_file.h"
#include "src/model/directory.h"
#include "tests/engine/testing/temp_dir.h"

namespace fq::testing {

inline std::filesystem::path golden_path(const std::string& name) {
  const char* shared = std::getenv("FRAMEQUILT_SHARED");
  return std::filesystem::path(shared != nullptr ? shared : "../shared") / "golden" / name;
}

#define SKIP_WITHOUT_GOLDEN_FILE(name)                            \
  if (!std::filesystem::exists(::fq::testing::golden_path(name))) \
  GTEST_SKIP() << "no " << ::fq::testing::golden_path(name) << " (set FRAMEQUILT_SHARED)"

class GoldenTensors {
 public:
  explicit GoldenTensors(const std::string& name) {
    auto file = MappedFile::open(golden_path(name));
    EXPECT_TRUE(file);
    file_ = std::move(*file);
    auto tensors = model::parse_safetensors(file_.bytes(), name);
    EXPECT_TRUE(tensors) << (tensors ? "" : tensors.error().to_string());
    if (tensors) tensors_ = std::move(*tensors);
  }
  const model::TensorView& operator[](const std::string& name) const { return tensors_.at(name); }
  bool has(const std::string& name) const { return tensors_.contains(name); }
  const float* floats(const std::string& name) const { return tensors_.at(name).f32(); }

 private:
  MappedFile file_;
  std::map<std::string, model::TensorView> tensors_;
};

inline nlohmann::json golden_manifest(const std::string& name) {
  return nlohmann::json::parse(read_file(golden_path(name)));
}

}  // namespace fq::testing
