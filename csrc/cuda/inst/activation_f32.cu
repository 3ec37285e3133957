#include "../activation_launch.cuh"

namespace fastattn::cuda {

template cudaError_t launch_activation<float>(const ActivationTask&, cudaStream_t);

}  // namespace fastattn::cuda
