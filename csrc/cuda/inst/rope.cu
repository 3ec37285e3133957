#include "../rope.cuh"

#include "../device.cuh"

namespace fastattn::cuda {

template <typename T>
cudaError_t launch_rope(const RopeTask& task, cudaStream_t stream) {
  const int64_t tiles = ceil_div(task.tokens * task.units, kRopeThreads);
  return launch_blocks(rope<T>, tiles * task.groups.value, kRopeThreads, 0, stream, task);
}

template cudaError_t launch_rope<float>(const RopeTask&, cudaStream_t);
template cudaError_t launch_rope<bf16>(const RopeTask&, cudaStream_t);
template cudaError_t launch_rope<f16>(const RopeTask&, cudaStream_t);

}  // namespace fastattn::cuda
