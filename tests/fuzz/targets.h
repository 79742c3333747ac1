// What the fuzzers check, shared by the libFuzzer programs of this folder and the seeded smoke run
// of the normal tests: any bytes give a value that keeps its promises or an Error with text, and
// never more.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string_view>

#include "src/model/directory.h"
#include "src/model/slots.h"

namespace fq::fuzz {

inline void require(bool condition, const char* promise) {
  if (condition) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

inline void require_clean(const Error& error) {
  require(!error.message.empty(), "an error has a message");
  for (const char c : error.message) {
    require(c >= 0x20 && c < 0x7f, "messages are printable whatever the input was");
  }
}

// Returns whether the input was accepted.
inline bool check_spec(std::string_view text) {
  const auto spec = model::parse_spec(text, "fuzz");
  if (!spec) {
    require_clean(spec.error());
    return false;
  }
  size_t linears = 0;
  for (const model::SlotInfo& slot : model::slots(*spec)) {
    if (!slot.linear) continue;
    ++linears;
    const auto it = spec->linears.find(slot.name);
    require(it != spec->linears.end(), "every linear is in the table");
    require(it->second.out == slot.out && it->second.in == slot.in, "sizes match");
  }
  require(linears == spec->linears.size(), "the table has nothing else");
  for (const model::TensorInfo& tensor : model::tensors(*spec)) {
    for (const int64_t dim : tensor.shape) require(dim > 0, "dimensions are positive");
  }
  return true;
}

inline bool check_safetensors(std::span<const std::byte> file) {
  const auto tensors = model::parse_safetensors(file, "fuzz");
  if (!tensors) {
    require_clean(tensors.error());
    return false;
  }
  size_t bytes = 0;
  for (const auto& [name, tensor] : *tensors) {
    require(tensor.bytes.empty() ||
                (tensor.bytes.data() >= file.data() &&
                 tensor.bytes.data() + tensor.bytes.size() <= file.data() + file.size()),
            "tensors lie inside the file");
    require(
        static_cast<size_t>(tensor.elements()) * dtype_bytes(tensor.dtype) == tensor.bytes.size(),
        "sizes equal dtype and shape");
    bytes += tensor.bytes.size();
  }
  require(bytes <= file.size(), "tensors do not overlap");
  return true;
}

}  // namespace fq::fuzz
