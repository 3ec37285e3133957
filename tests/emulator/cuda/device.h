#pragma once

#include <stddef.h>

namespace fastattn::emulator {

// Of one block of a kernel, as cudaFuncSetAttribute has left it.
size_t allowed_shared_bytes(const void* kernel);

}  // namespace fastattn::emulator
