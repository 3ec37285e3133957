#include "../flash_fwd_launch.cuh"

namespace fastattn::cuda {

template cudaError_t launch_flash_fwd_sm80<bf16, 64>(ForwardParams, cudaStream_t);

}  // namespace fastattn::cuda
