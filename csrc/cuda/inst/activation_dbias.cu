#include "../activation_dbias.cuh"
#include "../device.cuh"

namespace fastattn::cuda {

cudaError_t launch_activation_dbias(const ActivationTask& task, cudaStream_t stream) {
  constexpr int kThreads = kSumColumns * kSumLanes;
  return launch_blocks(activation_dbias, ceil_div(task.columns, kSumColumns), kThreads,
                       kThreads * sizeof(float), stream, task);
}

}  // namespace fastattn::cuda
