// The functions of rotary embedding that a level offers for one dtype.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

struct RopeKernels {};

}  // namespace fastattn::cpu
