// Norms on the host: which kernels run, with which tiles, over which workspace.
#include "device.cuh"
#include "fastattn/cuda_api.h"
#include "norm_kernels.h"

namespace fastattn::cuda {
namespace {

constexpr int kRunBytes = 16;

int run_columns(const NormParams& p) {
  return kRunBytes / static_cast<int>(dtype_size(p.dtype));
}

bool has_wide_out(const NormParams& p) {
  return p.out_dtype != p.dtype;
}

// Whether all runs of a tensor whose elements are adjacent can be loaded and stored at once.
bool is_whole(const NormParams& p, const void* data, DType dtype) {
  const int64_t columns = run_columns(p);
  const size_t bytes = min_of<size_t>(columns * dtype_size(dtype), kRunBytes);
  return p.shape.width % columns == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

bool are_whole(const NormParams& p, const void* data, DType dtype,
               const int64_t (&stride)[kRowDims]) {
  bool whole = is_whole(p, data, dtype);
  for (int d = 0; d < p.shape.dims; ++d) {
    const int64_t elements = kRunBytes / static_cast<int64_t>(dtype_size(dtype));
    whole &= p.shape.size[d] == 1 || stride[d] % elements == 0;
  }
  return whole;
}

bool are_whole(const NormParams& p, const ConstRows& rows, DType dtype) {
  return rows.step == 1 && are_whole(p, rows.data, dtype, rows.stride);
}

bool are_whole(const NormParams& p, const MutableRows& rows, DType dtype) {
  return are_whole(p, rows.data, dtype, rows.stride);
}

WholeRuns whole_runs(const NormParams& p) {
  WholeRuns whole = {};
  whole.input = are_whole(p, p.input, p.dtype);
  whole.residual = are_whole(p, p.residual, p.dtype);
  whole.summed = are_whole(p, p.summed, p.dtype);
  whole.normalised = are_whole(p, p.normalised, p.out_dtype);
  whole.weight = is_whole(p, p.weight, p.weight_dtype);
  whole.bias = is_whole(p, p.bias, p.bias_dtype);
  return whole;
}

double inverse_width(const NormParams& p) {
  return 1.0 / static_cast<double>(p.shape.width);
}

// run<T, O>()
template <typename Run>
cudaError_t run_for(const NormParams& p, const Run& run) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return has_wide_out(p) ? run.template operator()<bf16, float>()
                             : run.template operator()<bf16, bf16>();
    case DType::kFloat16:
      return has_wide_out(p) ? run.template operator()<f16, float>()
                             : run.template operator()<f16, f16>();
    default: return run.template operator()<float, float>();
  }
}

bool needs_dx(const NormGradParams& g) {
  return g.dresidual.data != nullptr || g.dinput.data != nullptr;
}

bool needs_sums(const NormGradParams& g) {
  return g.dweight != nullptr || g.dbias != nullptr;
}

size_t partial_sum_size(const NormParams& p) {
  return p.dtype == DType::kFloat32 ? sizeof(double) : sizeof(float);
}

// Whether one kernel finds the gradients of the rows and the sums over them.
bool is_fused(const NormBackwardParams& params) {
  return params.tile.is_held && needs_dx(params.gradient) && needs_sums(params.gradient);
}

size_t workspace_bytes(const NormBackwardParams& params) {
  if (!needs_sums(params.gradient)) return 0;
  return 2 * static_cast<size_t>(params.sums.count * params.sums.stride) *
         partial_sum_size(params.gradient.forward);
}

NormForwardParams forward_params(const NormParams& p, const DeviceLimits& limits) {
  const int columns = run_columns(p);
  NormForwardParams params = {p, {}, whole_runs(p), inverse_width(p), 0, 0};
  const auto set_tile = [&](int most_threads) {
    params.tile = row_tile(p.shape.width, columns, kHeldRuns, most_threads);
    params.shared_bytes = forward_shared_bytes(params.tile, kHeldRuns * columns, p.bias != nullptr);
  };
  set_tile(kForwardThreads);
  if (params.shared_bytes > static_cast<size_t>(limits.shared_bytes)) set_tile(0);
  const int64_t resident = resident_blocks(params.tile, kForwardThreads, params.shared_bytes,
                                           limits.multiprocessors, limits.shared_bytes);
  params.blocks = row_blocks(p.shape.rows, params.tile, resident, 1);
  return params;
}

// The tiles, and so what the workspace is for.
NormBackwardParams planned(const NormGradParams& g, const DeviceLimits& limits) {
  const NormParams& p = g.forward;
  const int columns = run_columns(p), runs = has_wide_out(p) ? kWideHeldRuns : kHeldRuns;
  const int threads = backward_threads(g.dbias != nullptr);
  NormBackwardParams params = {};
  params.gradient = g;
  params.tile = row_tile(p.shape.width, columns, runs, threads);
  params.shared_bytes = backward_shared_bytes(params.tile, runs * columns, partial_sum_size(p));
  const int64_t resident = resident_blocks(params.tile, threads, params.shared_bytes,
                                           limits.multiprocessors, limits.shared_bytes);
  const int64_t least_rows = is_fused(params) ? kLeastSummedRows : 1;
  params.blocks = row_blocks(p.shape.rows, params.tile, resident, least_rows);
  const int64_t strips = ceil_div(p.shape.width, int64_t{columns} * kColumnThreads);
  params.sums.count = is_fused(params)
                          ? params.blocks
                          : column_slices(p.shape.rows, strips, limits.multiprocessors);
  params.sums.stride = round_up(p.shape.width, columns);
  return params;
}

NormBackwardParams backward_params(const NormGradParams& g, const DeviceLimits& limits,
                                   void* workspace) {
  const NormParams& p = g.forward;
  NormBackwardParams params = planned(g, limits);
  params.whole = whole_runs(p);
  params.whole.dnormalised = are_whole(p, g.dnormalised, p.out_dtype);
  params.whole.dsummed = are_whole(p, g.dsummed, p.dtype);
  params.whole.dresidual = are_whole(p, g.dresidual, p.dtype);
  params.whole.dinput = are_whole(p, g.dinput, p.dtype);
  params.inverse_width = inverse_width(p);
  params.sums.weight = workspace;
  params.sums.bias = static_cast<char*>(workspace) + workspace_bytes(params) / 2;
  return params;
}

cudaError_t run_backward(const NormBackwardParams& params, cudaStream_t stream) {
  const NormGradParams& g = params.gradient;
  cudaError_t error = run_for(g.forward, [&]<typename T, typename O>() {
    const cudaError_t failed =
        needs_dx(g) ? launch_norm_backward<T, O>(params, stream) : cudaSuccess;
    if (failed != cudaSuccess || !needs_sums(g) || is_fused(params)) return failed;
    return launch_norm_column_sums<T, O>(params, stream);
  });
  if (error != cudaSuccess || !needs_sums(g)) return error;
  return g.forward.dtype == DType::kFloat32 ? launch_norm_add_partials<double>(params, stream)
                                            : launch_norm_add_partials<float>(params, stream);
}

}  // namespace

Status norm_forward(const NormParams& p, const Place& place) {
  DeviceLimits limits = {};
  const cudaError_t error = device_limits(place.device, &limits);
  if (error != cudaSuccess) return status_of(error);
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const NormForwardParams params = forward_params(p, limits);
  return status_of(run_for(p, [&]<typename T, typename O>() {
    return launch_norm_forward<T, O>(params, static_cast<cudaStream_t>(place.stream));
  }));
}

size_t norm_backward_workspace(const NormGradParams& g, const Place& place) {
  DeviceLimits limits = {};
  if (device_limits(place.device, &limits) != cudaSuccess) return 0;  // the op will say why
  return workspace_bytes(planned(g, limits));
}

Status norm_backward(const NormGradParams& g, void* workspace, const Place& place) {
  DeviceLimits limits = {};
  const cudaError_t error = device_limits(place.device, &limits);
  if (error != cudaSuccess) return status_of(error);
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const NormBackwardParams params = backward_params(g, limits, workspace);
  return status_of(run_backward(params, static_cast<cudaStream_t>(place.stream)));
}

}  // namespace fastattn::cuda
