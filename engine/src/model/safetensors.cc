// The safetensors container, read strictly. Copies names and shapes; the data stay where they are.
// Any thread.
#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <optional>
#include <utility>

#include "src/core/printable.h"
#include "src/model/directory.h"
#include "src/model/json_reader.h"

namespace fq::model {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "model files hold little-endian numbers");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr int64_t kMaxDim = int64_t{1} << 53;
constexpr size_t kMaxRank = 16;
constexpr size_t kMaxName = 1024;
constexpr JsonLimits kHeaderLimits = {.depth = 4, .values = 1 << 21};

using Tensors = std::map<std::string, TensorView>;

Error corrupt(std::string_view where, const std::string& problem) {
  return Error{Code::kCorruptModel, std::string(where) + ": " + problem, ""};
}

// The tensor's bytes as its dtype and shape imply them; empty when they do not fit 63 bits.
std::optional<uint64_t> byte_size(const TensorView& tensor) {
  // Zeros are left out of the product, so that no order of multiplication (elements() included) can
  // overflow.
  auto product = static_cast<int64_t>(dtype_bytes(tensor.dtype));
  bool empty = false;
  for (const int64_t dim : tensor.shape) {
    empty = empty || dim == 0;
    if (dim != 0 && __builtin_mul_overflow(product, dim, &product)) return std::nullopt;
  }
  return empty ? 0 : static_cast<uint64_t>(product);
}

struct Entry {
  uint64_t begin = 0, end = 0;
  const std::string* name = nullptr;
};

// One tensor of the header. The range [begin, end) is checked against the data by the caller.
TensorView read_tensor(const json& value, const std::string& path, Entry& entry,
                       ReadErrors& errors) {
  ObjectReader reader(value, path, errors);
  TensorView tensor;
  tensor.dtype = reader.choice<DType>("dtype", {{"F32", DType::kF32},
                                                {"F16", DType::kF16},
                                                {"BF16", DType::kBF16},
                                                {"U8", DType::kU8},
                                                {"I8", DType::kI8},
                                                {"I32", DType::kI32},
                                                {"I64", DType::kI64}});
  for (const json& dim : reader.array("shape", kMaxRank)) {
    if (!dim.is_number_unsigned() || dim.get<uint64_t>() > uint64_t{kMaxDim}) {
      errors.add(reader.path_of("shape"), "expected integers in [0, 2^53], got " + describe(dim));
      break;
    }
    tensor.shape.push_back(dim.get<int64_t>());
  }
  const json& offsets = reader.array("data_offsets", 2);
  if (offsets.size() == 2 && offsets[0].is_number_unsigned() && offsets[1].is_number_unsigned()) {
    entry.begin = offsets[0].get<uint64_t>();
    entry.end = offsets[1].get<uint64_t>();
  } else {
    errors.add(reader.path_of("data_offsets"), "expected two integers, begin and end");
  }
  reader.finish();
  return tensor;
}

void check_metadata(const json& metadata, ReadErrors& errors) {
  if (!metadata.is_object()) {
    errors.add("__metadata__", "expected an object, got " + describe(metadata));
    return;
  }
  for (const auto& item : metadata.items()) {
    if (!item.value().is_string()) {
      errors.add("__metadata__", printable(item.key()) + " is not a string");
      return;
    }
  }
}

Result<Tensors> read_tensors(const json& header, std::span<const std::byte> data,
                             std::string_view where) {
  ReadErrors errors(where);
  Tensors tensors;
  std::vector<Entry> entries;
  for (const auto& item : header.items()) {
    if (item.key() == "__metadata__") {
      check_metadata(item.value(), errors);
      continue;
    }
    const std::string path = "tensor " + printable(item.key());
    if (item.key().size() > kMaxName) errors.add(path, "name too long");
    Entry entry;
    TensorView tensor = read_tensor(item.value(), path, entry, errors);
    if (errors.any()) break;
    if (entry.begin > entry.end || entry.end > data.size()) {
      errors.add(path, "data offsets [" + std::to_string(entry.begin) + ", " +
                           std::to_string(entry.end) + "] leave the " +
                           std::to_string(data.size()) + " bytes of data");
      break;
    }
    const std::optional<uint64_t> size = byte_size(tensor);
    if (!size || *size != entry.end - entry.begin) {
      errors.add(path, "dtype and shape need " + (size ? std::to_string(*size) : "too many") +
                           " bytes, data offsets span " + std::to_string(entry.end - entry.begin));
      break;
    }
    tensor.bytes = data.subspan(entry.begin, entry.end - entry.begin);
    entry.name = &tensors.emplace(item.key(), std::move(tensor)).first->first;
    entries.push_back(entry);
  }
  if (errors.any()) return errors.first();

  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t covered = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != covered) {
      return corrupt(where, "tensor " + printable(*entry.name) + " starts at byte " +
                                std::to_string(entry.begin) + " of the data, expected " +
                                std::to_string(covered) +
                                (entry.begin < covered ? " (overlap)" : " (gap)"));
    }
    covered = entry.end;
  }
  if (covered != data.size()) {
    return corrupt(where, "tensors cover " + std::to_string(covered) +
                              " bytes of data, the file has " + std::to_string(data.size()));
  }
  return tensors;
}

}  // namespace

Result<Tensors> parse_safetensors(std::span<const std::byte> file, std::string_view where) {
  if (file.size() < kLengthBytes) {
    return corrupt(where, "only " + std::to_string(file.size()) + " bytes, too short for a header");
  }
  uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  if (length > kMaxHeaderBytes || length > file.size() - kLengthBytes) {
    return corrupt(where, "header of " + std::to_string(length) + " bytes in a file of " +
                              std::to_string(file.size()) + " (at most " +
                              std::to_string(kMaxHeaderBytes) + " are read)");
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  if (!text.starts_with('{')) return corrupt(where, "the header does not start with '{'");
  try {
    FQ_ASSIGN_OR_RETURN(const json header, parse_json_object(text, where, kHeaderLimits));
    return read_tensors(header, file.subspan(kLengthBytes + length), where);
  } catch (const std::bad_alloc&) {
    return Error{Code::kOutOfMemory, std::string(where) + ": not enough memory for the header", ""};
  }
}

}  // namespace fq::model
