#include "../flash_fwd_sm90_launch.cuh"

namespace fastattn::cuda {

template cudaError_t launch_flash_fwd_sm90<bf16, 64, 64>(const ForwardParamsSm90&, int,
                                                         cudaStream_t);

}  // namespace fastattn::cuda
