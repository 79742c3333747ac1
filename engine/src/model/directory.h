// A model directory, opened: strict config, mapped safetensors files, tensors checked against the
// description. Immutable; any thread. Views live as long as the directory.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "framequilt/status.h"
#include "framequilt/types.h"
#include "src/core/mapped_file.h"
#include "src/model/spec.h"

namespace fq::model {

// Bytes of one tensor inside a mapped file.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;

  int64_t elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  const float* f32() const { return reinterpret_cast<const float*>(bytes.data()); }
};

// Parses a safetensors file image (8-byte little-endian header length, JSON header, data). Strict:
// header at most 100 MB, offsets in range, contiguous, no overlap, no gap, sizes equal dtype x
// shape, no duplicate names; dtypes of fq::DType only. Does not copy.
Result<std::map<std::string, TensorView>> parse_safetensors(std::span<const std::byte> file,
                                                            std::string_view where);

// Parses and validates config.json text. Unknown keys, missing keys, wrong types, values out of
// range: corrupt_model; another format version: version_mismatch.
Result<ModelSpec> parse_spec(std::string_view json, std::string_view where);

class ModelDirectory {
 public:
  static Result<std::unique_ptr<const ModelDirectory>> open(const std::filesystem::path& path,
                                                            bool verify_checksums);

  const ModelSpec& spec() const { return spec_; }
  const std::filesystem::path& path() const { return path_; }
  // nullptr when there is no such tensor.
  const TensorView* find(const std::string& name) const;
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  uint64_t weight_bytes() const;

 private:
  ModelDirectory() = default;
  std::filesystem::path path_;
  ModelSpec spec_;
  std::vector<MappedFile> files_;
  std::map<std::string, TensorView> tensors_;
};

}  // namespace fq::model
