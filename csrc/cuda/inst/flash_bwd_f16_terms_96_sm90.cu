#include "../flash_bwd_sm90_launch.cuh"

namespace fastattn::cuda {

template cudaError_t launch_flash_bwd_sm90<f16, 96, 96, true>(const BackwardParamsSm90&,
                                                              cudaStream_t);

}  // namespace fastattn::cuda
