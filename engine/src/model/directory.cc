// Opens a model directory: description, files, tensors, each checked against the other. The weights
// themselves are only read when checksums are asked for: opening a large model touches a few pages.
#include "src/model/directory.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <set>
#include <utility>

#include "src/core/aligned.h"
#include "src/core/printable.h"
#include "src/core/sha256.h"
#include "src/model/slots.h"

namespace fq::model {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxConfigBytes = 16 << 20;
constexpr std::string_view kConfigName = "config.json";
constexpr std::string_view kWeightSuffix = ".safetensors";
constexpr std::string_view kPadPrefix = "pad.";
constexpr std::string_view kIncomplete =
    "the directory is incomplete or was changed; copy or convert it again";

using Tensors = std::map<std::string, TensorView>;

Error corrupt(std::string message) {
  return Error{Code::kCorruptModel, std::move(message), std::string(kIncomplete)};
}

Result<ModelSpec> read_config(const fs::path& directory) {
  const fs::path path = directory / kConfigName;
  Result<MappedFile> opened = MappedFile::open(path);
  if (!opened && opened.error().code == Code::kNotFound) {
    return Error{Code::kNotFound,
                 "no model directory at '" + directory.string() + "': there is no config.json",
                 "name a directory that `framequilt convert` wrote"};
  }
  if (!opened) return opened.error();
  const MappedFile file = std::move(*opened);
  if (file.bytes().size() > kMaxConfigBytes) {
    return corrupt("'" + path.string() + "' has " + std::to_string(file.bytes().size()) +
                   " bytes; at most " + std::to_string(kMaxConfigBytes) + " are read");
  }
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()),
                              file.bytes().size());
  return parse_spec(text, path.string());
}

// Sizes (always) and SHA-256 (when asked) of a listed file.
Status check_file(const MappedFile& mapped, const FileSpec& file, const fs::path& path,
                  bool verify_checksums) {
  if (mapped.bytes().size() != file.bytes) {
    return corrupt("'" + path.string() + "' has " + std::to_string(mapped.bytes().size()) +
                   " bytes, config.json says " + std::to_string(file.bytes));
  }
  if (!verify_checksums) return {};
  const std::string digest = sha256_hex(mapped.bytes());
  if (digest != file.sha256) {
    return corrupt("SHA-256 of '" + path.string() + "' is " + digest + ", config.json says " +
                   file.sha256);
  }
  return {};
}

Status merge(Tensors&& part, const fs::path& path, Tensors& all) {
  for (auto& [name, tensor] : part) {
    if (name.starts_with(kPadPrefix)) continue;
    // The container starts its data anywhere; kernels load whole cache lines.
    if (reinterpret_cast<uintptr_t>(tensor.bytes.data()) % kAlignment != 0) {
      return corrupt("'" + path.string() + "': tensor " + printable(name) +
                     " does not start at a multiple of 64 bytes");
    }
    if (!all.emplace(name, std::move(tensor)).second) {
      return corrupt("'" + path.string() + "': tensor " + printable(name) +
                     " is in another file too");
    }
  }
  return {};
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t dim : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

// Exactly the tensors that the description implies or allows, with their dtypes and shapes.
Status check_tensors(const ModelSpec& spec, const Tensors& found) {
  const std::vector<TensorInfo> wanted = tensors(spec);
  size_t matched = 0;
  for (const TensorInfo& info : wanted) {
    const auto it = found.find(info.name);
    if (it == found.end() && info.optional) continue;
    if (it == found.end()) return corrupt("tensor \"" + info.name + "\" is missing");
    const TensorView& tensor = it->second;
    if (tensor.dtype != info.dtype || tensor.shape != info.shape) {
      return corrupt("tensor \"" + info.name + "\" is " + std::string(dtype_name(tensor.dtype)) +
                     " " + shape_text(tensor.shape) + ", the description needs " +
                     std::string(dtype_name(info.dtype)) + " " + shape_text(info.shape));
    }
    ++matched;
  }
  if (matched == found.size()) return {};
  std::set<std::string_view> names;
  for (const TensorInfo& info : wanted) names.insert(info.name);
  for (const auto& [name, tensor] : found) {
    if (!names.contains(name)) return corrupt("nothing uses tensor " + printable(name));
  }
  return {};
}

// No element has all exponent bits (`mask`) set, which is what infinities and NaNs have in common.
template <class Bits>
bool all_finite(std::span<const std::byte> bytes, Bits mask) {
  for (size_t i = 0; i + sizeof(Bits) <= bytes.size(); i += sizeof(Bits)) {
    Bits bits;
    std::memcpy(&bits, bytes.data() + i, sizeof(Bits));
    if ((bits & mask) == mask) return false;
  }
  return true;
}

bool is_finite(const TensorView& tensor) {
  switch (tensor.dtype) {
    case DType::kF32:
      return all_finite<uint32_t>(tensor.bytes, 0x7f800000);
    case DType::kF16:
      return all_finite<uint16_t>(tensor.bytes, 0x7c00);
    case DType::kBF16:
      return all_finite<uint16_t>(tensor.bytes, 0x7f80);
    default:
      return true;
  }
}

}  // namespace

Result<std::unique_ptr<const ModelDirectory>> ModelDirectory::open(const fs::path& path,
                                                                   bool verify_checksums) {
  try {
    std::unique_ptr<ModelDirectory> directory(new ModelDirectory);
    directory->path_ = path;
    FQ_ASSIGN_OR_RETURN(directory->spec_, read_config(path));
    for (const FileSpec& file : directory->spec_.files) {
      const fs::path file_path = path / file.name;
      Result<MappedFile> mapped = MappedFile::open(file_path);
      if (!mapped && mapped.error().code == Code::kNotFound) {
        return corrupt("'" + file_path.string() + "' is missing, config.json lists it");
      }
      if (!mapped) return mapped.error();
      FQ_RETURN_IF_ERROR(check_file(*mapped, file, file_path, verify_checksums));
      if (!file.name.ends_with(kWeightSuffix)) continue;
      FQ_ASSIGN_OR_RETURN(Tensors part, parse_safetensors(mapped->bytes(), file_path.string()));
      FQ_RETURN_IF_ERROR(merge(std::move(part), file_path, directory->tensors_));
      directory->files_.push_back(std::move(*mapped));
    }
    FQ_RETURN_IF_ERROR(check_tensors(directory->spec_, directory->tensors_));
    if (verify_checksums) {
      for (const auto& [name, tensor] : directory->tensors_) {
        if (!is_finite(tensor)) return corrupt("tensor \"" + name + "\" holds infinity or NaN");
      }
    }
    return std::unique_ptr<const ModelDirectory>(std::move(directory));
  } catch (const std::bad_alloc&) {
    return Error{Code::kOutOfMemory, "not enough memory to open '" + path.string() + "'", ""};
  }
}

const TensorView* ModelDirectory::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

uint64_t ModelDirectory::weight_bytes() const {
  uint64_t bytes = 0;
  for (const auto& [name, tensor] : tensors_) bytes += tensor.bytes.size();
  return bytes;
}

}  // namespace fq::model
