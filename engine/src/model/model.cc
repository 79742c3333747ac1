// fq::Model: the public handle of an opened model directory. Shared, immutable; any thread.
#include "framequilt/model.h"

#include <utility>

#include "src/model/directory.h"

namespace fq {

Result<std::shared_ptr<const Model>> Model::open(const std::filesystem::path& directory,
                                                 const OpenOptions& options) {
  FQ_ASSIGN_OR_RETURN(std::unique_ptr<const model::ModelDirectory> opened,
                      model::ModelDirectory::open(directory, options.verify_checksums));
  return std::shared_ptr<const Model>(new Model(std::move(opened)));
}

Model::Model(std::unique_ptr<const model::ModelDirectory> directory)
    : directory_(std::move(directory)) {}

Model::~Model() = default;

}  // namespace fq
