// The functions of the CUDA backend. A stream is a cudaStream_t, as void*: no CUDA headers here.
#pragma once

#include "types.h"

namespace fastattn::cuda {

struct ProbeResult {
  int32_t arch;       // what the code that ran was compiled for: 800, 900, ...
  const char* error;  // what failed, or nullptr
};

// Runs one warp on `device` in `stream`, waits for it, and checks what it wrote: proof that this
// build's kernels launch there. A diagnosis, not an op: it allocates and synchronises.
Status probe(int32_t device, void* stream, ProbeResult* result);

}  // namespace fastattn::cuda
