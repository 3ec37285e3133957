#include "../norm_fwd.cuh"

namespace fastattn::cuda {

template cudaError_t launch_norm_forward<float, float>(const NormForwardParams&, cudaStream_t);

}  // namespace fastattn::cuda
