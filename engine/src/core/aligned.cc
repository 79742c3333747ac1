#include "src/core/aligned.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fq {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Smaller ones would waste too much of their last huge page.
std::align_val_t alignment_for(size_t bytes) {
  return std::align_val_t(bytes >= 2 * kHugePage ? kHugePage : kAlignment);
}

}  // namespace

void* allocate_aligned(size_t bytes) {
  void* const memory = ::operator new(bytes, alignment_for(bytes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A wish; without it everything still works.
  if (bytes >= 2 * kHugePage) (void)::madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return memory;
}

void free_aligned(void* memory, size_t bytes) { ::operator delete(memory, alignment_for(bytes)); }

}  // namespace fq
