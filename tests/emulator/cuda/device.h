#pragma once

#include <stddef.h>

namespace fastattn::emulator {

// What differs between the devices.
struct Device {
  int major, minor;
  size_t block_shared_bytes, shared_bytes;  // of a block, of a multiprocessor
  int cache_bytes;
};

// That of this host thread, as cudaSetDevice has left it.
const Device& current_device();

// Of one block of a kernel, as cudaFuncSetAttribute has left it.
size_t allowed_shared_bytes(const void* kernel);

}  // namespace fastattn::emulator
