// The CUDA stream that torch works in, through torch's C shim.
#pragma once

#include <stdint.h>

// Declared weak, so that one binary loads under every build of torch: under a CPU build it is null.
extern "C" __attribute__((weak, visibility("default"))) int32_t
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastattn {

// Sets *stream to torch's current stream on `device`. False, with *stream untouched, where torch
// has no CUDA.
inline bool current_cuda_stream(int32_t device, void** stream) {
  return aoti_torch_get_current_cuda_stream != nullptr &&
         aoti_torch_get_current_cuda_stream(device, stream) == 0;
}

}  // namespace fastattn
