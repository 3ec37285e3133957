#include "../norm_fwd.cuh"

namespace fastattn::cuda {

template cudaError_t launch_norm_forward<bf16, bf16>(const NormForwardParams&, cudaStream_t);
template cudaError_t launch_norm_forward<bf16, float>(const NormForwardParams&, cudaStream_t);

}  // namespace fastattn::cuda
