// Turns what the libraries underneath throw into errors: no exception leaves the engine. Any
// thread.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "framequilt/status.h"

namespace fq::text {

// Runs `work`, which returns a Result or a Status; an exception becomes an error of `code`.
template <class Work>
auto guarded(Code code, const std::string& what, Work work) -> decltype(work()) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return Error{Code::kOutOfMemory, what + ": not enough memory", "close other programs"};
  } catch (const std::exception& error) {
    return Error{code, what + ": " + error.what(), ""};
  }
}

}  // namespace fq::text
