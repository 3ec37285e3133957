#include "../norm_fwd.cuh"

namespace fastattn::cuda {

template cudaError_t launch_norm_forward<f16, f16>(const NormForwardParams&, cudaStream_t);
template cudaError_t launch_norm_forward<f16, float>(const NormForwardParams&, cudaStream_t);

}  // namespace fastattn::cuda
