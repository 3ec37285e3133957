// The functions of norms that a level offers for one dtype.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

struct NormKernels {};

}  // namespace fastattn::cpu
