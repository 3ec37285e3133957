#include "../activation_launch.cuh"

namespace fastattn::cuda {

template cudaError_t launch_activation<f16>(const ActivationTask&, cudaStream_t);

}  // namespace fastattn::cuda
