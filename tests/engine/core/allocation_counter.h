// Counts the calls of operator new in the test program of this folder, on any thread.
#pragma once

#include <cstdint>

namespace fq::testing {

int64_t allocation_count();

}  // namespace fq::testing
