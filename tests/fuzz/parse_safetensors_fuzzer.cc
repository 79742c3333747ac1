// libFuzzer program: safetensors files of any kind.
#include <cstdint>

#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fq::fuzz::check_safetensors({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
