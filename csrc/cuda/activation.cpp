// The activations on the host: what their kernels are told.
#include "activation_kernels.h"
#include "device.cuh"
#include "fastattn/cuda_api.h"

namespace fastattn::cuda {
namespace {

// How a tensor's chunks of `columns` are read.
ChunkView chunk_view(const ActivationParams& p, const ActivationView& view,
                     const ActivationTile& tile, int64_t columns, DType dtype) {
  ChunkView result = {view, false, 0};
  if (view.data == nullptr) return result;
  const int64_t size = static_cast<int64_t>(dtype_size(dtype));
  // A bias of fewer bits than the others has fewer bytes beside a chunk of those.
  const int64_t alignment = min_of<int64_t>(columns * size, 16);
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % static_cast<size_t>(alignment) == 0;
  for (int d = 0; d < p.outer_dims; ++d) {
    aligned &= p.outer_size[d] <= 1 || view.outer_stride[d] * size % alignment == 0;
  }
  result.is_chunked = aligned && view.stride == 1;
  result.step =
      tile.along ? tile.lanes * columns * view.stride : tile.rows_at_once * view.outer_stride[0];
  return result;
}

ActivationTask task_of(const ActivationParams& p, const DeviceLimits& limits) {
  ActivationTask task = {};
  task.kind = p.kind;
  task.bias_dtype = p.bias_dtype;
  task.outer_dims = p.outer_dims;
  for (int d = 0; d < p.outer_dims; ++d) task.outer_size[d] = p.outer_size[d];
  task.rows = p.columns == 0 ? 0 : activation_rows(p);
  task.columns = p.columns;
  task.dbias = p.dbias;

  const int64_t columns = 16 / static_cast<int64_t>(dtype_size(p.dtype));
  const bool reads_one = p.up.data == nullptr && p.dout.data == nullptr;
  const int steps = reads_one ? kActivationSteps<1> : kActivationSteps<2>;
  // The gradient of a bias is summed down the rows, however few they are.
  const int64_t rows = p.dbias != nullptr ? max_of<int64_t>(task.rows, steps) : task.rows;
  task.tile = activation_tile(rows, ceil_div(p.columns, columns), steps);
  task.strips = divisor(static_cast<uint32_t>(max_of(task.tile.strips, 1)));
  if (p.dbias != nullptr) {
    task.slices = bias_grad_slices(task.rows, task.tile, limits.multiprocessors);
  }

  const auto view_of = [&](const ActivationView& view) {
    return chunk_view(p, view, task.tile, columns, p.dtype);
  };
  task.input = view_of(p.input);
  task.up = view_of(p.up);
  task.bias = chunk_view(p, p.bias, task.tile, columns, p.bias_dtype);
  task.out = view_of(p.out);
  task.dout = view_of(p.dout);
  task.dinput = view_of(p.dinput);
  task.dup = view_of(p.dup);
  return task;
}

cudaError_t launch_dtype(DType dtype, const ActivationTask& task, cudaStream_t stream) {
  switch (dtype) {
    case DType::kBFloat16: return launch_activation<bf16>(task, stream);
    case DType::kFloat16: return launch_activation<f16>(task, stream);
    default: return launch_activation<float>(task, stream);
  }
}

Status run(const ActivationParams& p, void* workspace, const Place& place) {
  DeviceLimits limits = {};
  cudaError_t error = device_limits(place.device, &limits);
  if (error != cudaSuccess) return status_of(error);
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  ActivationTask task = task_of(p, limits);
  task.sums = static_cast<float*>(workspace);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  if (task.rows > 0) error = launch_dtype(p.dtype, task, stream);
  if (error == cudaSuccess && p.dbias != nullptr) error = launch_activation_dbias(task, stream);
  return status_of(error);
}

}  // namespace

size_t activation_backward_workspace(const ActivationParams& p, const Place& place) {
  DeviceLimits limits = {};
  if (p.dbias == nullptr) return 0;
  if (device_limits(place.device, &limits) != cudaSuccess) return 0;  // the op will say why
  return static_cast<size_t>(task_of(p, limits).slices.count * p.columns) * sizeof(float);
}

Status activation_forward(const ActivationParams& p, const Place& place) {
  return run(p, nullptr, place);
}

Status activation_backward(const ActivationParams& p, void* workspace, const Place& place) {
  return run(p, workspace, place);
}

}  // namespace fastattn::cuda
