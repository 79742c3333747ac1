// An opened model directory: its description and its memory-mapped weights. Immutable after open(),
// shared by any number of engines and threads.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "framequilt/status.h"

namespace fq {

namespace model {
class ModelDirectory;
}

struct OpenOptions {
  bool verify_checksums = false;  // read every byte and compare SHA-256 with the config
};

class Model {
 public:
  // Reads config.json, maps the weight files, checks every tensor against the description.
  // Errors: not_found, corrupt_model, version_mismatch, unsupported, io.
  static Result<std::shared_ptr<const Model>> open(const std::filesystem::path& directory,
                                                   const OpenOptions& options = {});
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const model::ModelDirectory& directory() const { return *directory_; }

 private:
  explicit Model(std::unique_ptr<const model::ModelDirectory> directory);
  std::unique_ptr<const model::ModelDirectory> directory_;
};

}  // namespace fq
