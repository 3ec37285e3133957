// The functions of activations that a level offers for one dtype.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

struct ActivationKernels {};

}  // namespace fastattn::cpu
