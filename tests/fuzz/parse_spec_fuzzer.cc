// libFuzzer program: config.json text of any kind.
#include <cstdint>

#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fq::fuzz::check_spec({reinterpret_cast<const char*>(data), size});
  return 0;
}
