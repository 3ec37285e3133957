#include "../norm_bwd.cuh"

namespace fastattn::cuda {

template cudaError_t launch_norm_backward<f16, f16>(const NormBackwardParams&, cudaStream_t);
template cudaError_t launch_norm_backward<f16, float>(const NormBackwardParams&, cudaStream_t);

}  // namespace fastattn::cuda
