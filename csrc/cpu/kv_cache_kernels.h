// The functions of cache writes that a level offers for one dtype.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

struct CacheKernels {
  size_t (*scratch_bytes)(const CacheUpdateParams&);
  // Tokens [first, last) in order, heads [first_head, last_head).
  void (*write_tokens)(const CacheUpdateParams&, int64_t first, int64_t last, int64_t first_head,
                       int64_t last_head, void* scratch);
};

}  // namespace fastattn::cpu
