#include "../norm_bwd.cuh"

namespace fastattn::cuda {

template cudaError_t launch_norm_backward<float, float>(const NormBackwardParams&, cudaStream_t);

}  // namespace fastattn::cuda
