// How large results come by their memory.
#pragma once

#include "tensor_args.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn::bind {

// A large result is memory that the system has yet to provide: page by page, at the first write to
// each, which takes an order of magnitude longer than the write. In huge pages it takes a fifth of
// that. A hint, which changes nothing where they are not to be had.
inline void prefer_huge_pages(const Tensor& tensor, size_t element_size) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr size_t kLeastBytes = size_t{8} << 20;
  const size_t bytes = static_cast<size_t>(tensor.numel()) * element_size;
  if (bytes < kLeastBytes) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (data + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
  (void)element_size;
#endif
}

}  // namespace fastattn::bind
