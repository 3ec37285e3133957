#include "../activation_launch.cuh"

namespace fastattn::cuda {

template cudaError_t launch_activation<bf16>(const ActivationTask&, cudaStream_t);

}  // namespace fastattn::cuda
