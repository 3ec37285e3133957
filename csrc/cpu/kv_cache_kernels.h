// The functions of cache writes that a level offers for one dtype.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

struct CacheKernels {};

}  // namespace fastattn::cpu
