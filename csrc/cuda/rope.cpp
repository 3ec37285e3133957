// Rotary embedding on the host: what its kernel is told.
#include "device.cuh"
#include "fastattn/cuda_api.h"
#include "rope_kernels.h"

namespace fastattn::cuda {
namespace {

// Whether rows of contiguous columns all begin at a multiple of 16 bytes, or of `elements` where
// these are fewer. `strides` lead from row to row; what is of size 1 is not stepped over.
class Alignment {
 public:
  Alignment(const void* data, int64_t column_stride, size_t element_bytes, int64_t elements)
      : elements_(min_of(elements, 16 / static_cast<int64_t>(element_bytes))) {
    const size_t bytes = static_cast<size_t>(elements_) * element_bytes;
    holds_ = column_stride == 1 && reinterpret_cast<uintptr_t>(data) % bytes == 0;
  }
  Alignment& step(int64_t size, int64_t stride) {
    holds_ &= size <= 1 || stride % elements_ == 0;
    return *this;
  }
  Alignment& batch(const RopeParams& p, const int64_t (&stride)[kRopeBatchDims]) {
    for (int d = 0; d < p.batch_dims; ++d) step(p.batch_size[d], stride[d]);
    return *this;
  }
  bool holds() const {
    return holds_;
  }

 private:
  int64_t elements_;
  bool holds_;
};

bool is_chunked(const RopeParams& p, int64_t heads, const void* data,
                const int64_t (&batch_stride)[kRopeBatchDims], const int64_t (&stride)[3]) {
  const size_t bytes = dtype_size(p.dtype);
  return Alignment(data, stride[2], bytes, 16 / static_cast<int64_t>(bytes))
      .batch(p, batch_stride)
      .step(heads, stride[0])
      .step(p.length, stride[1])
      .holds();
}

RopeChunks chunks_of(const RopeParams& p, int64_t columns) {
  RopeChunks chunks = {};
  for (int n = 0; n < p.num_operands; ++n) {
    const RopeOperand& o = p.operand[n];
    chunks.x[n] = is_chunked(p, o.heads, o.x, o.x_batch_stride, o.x_stride);
    chunks.out[n] = is_chunked(p, o.heads, o.out, o.out_batch_stride, o.out_stride);
  }
  chunks.halves = p.rotary_dim / 2 % columns == 0;
  chunks.rest = p.rotary_dim % columns == 0;
  const auto table = [&](const void* data, const int64_t (&batch_stride)[kRopeBatchDims],
                         const int64_t (&stride)[2]) {
    return Alignment(data, stride[1], dtype_size(p.table_dtype), columns)
        .batch(p, batch_stride)
        .step(p.table_rows, stride[0])
        .holds();
  };
  chunks.cos = table(p.cos, p.cos_batch_stride, p.cos_stride);
  chunks.sin = table(p.sin, p.sin_batch_stride, p.sin_stride);
  return chunks;
}

RopeTask task_of(const RopeParams& p, const DeviceLimits& limits) {
  const int64_t columns = 16 / static_cast<int64_t>(dtype_size(p.dtype));
  RopeTask task = {};
  task.params = p;
  task.chunked = chunks_of(p, columns);
  task.tokens = rope_batch(p) * p.length;
  task.rotated_units = ceil_div(p.rotary_dim / 2, columns);
  int64_t heads = 0, copied = 0;
  for (int n = 0; n < p.num_operands; ++n) {
    const RopeOperand& o = p.operand[n];
    heads += o.heads;
    // In place they are where they belong.
    if (o.x != o.out) copied = max_of(copied, ceil_div(o.head_dim - p.rotary_dim, 2 * columns));
  }
  task.units = task.rotated_units + copied;
  if (task.tokens * task.units * heads == 0) return task;
  const int64_t tiles = ceil_div(task.tokens * task.units, kRopeThreads);
  task.heads_of_group = rope_heads_of_group(tiles, heads, limits.multiprocessors);
  task.groups = divisor(static_cast<uint32_t>(ceil_div(heads, task.heads_of_group)));
  return task;
}

cudaError_t launch_dtype(const RopeTask& task, cudaStream_t stream) {
  switch (task.params.dtype) {
    case DType::kBFloat16: return launch_rope<bf16>(task, stream);
    case DType::kFloat16: return launch_rope<f16>(task, stream);
    default: return launch_rope<float>(task, stream);
  }
}

}  // namespace

Status rope(const RopeParams& p, const Place& place) {
  DeviceLimits limits = {};
  const cudaError_t error = device_limits(place.device, &limits);
  if (error != cudaSuccess) return status_of(error);
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const RopeTask task = task_of(p, limits);
  if (task.heads_of_group == 0) return Status::kOk;  // nothing to do
  return status_of(launch_dtype(task, static_cast<cudaStream_t>(place.stream)));
}

}  // namespace fastattn::cuda
