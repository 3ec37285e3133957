// Sums over rows of a norm's backward pass: on their own, for rows that no block can hold or where
// nothing else is asked for; and from partial sums to dweight and dbias.
#pragma once

#include "norm_bwd.cuh"

namespace fastattn::cuda {

// A thread has a run of columns, a block every so many rows.
template <typename T, typename O>
FA_KERNEL(kColumnThreads, 1)
void norm_column_sums_kernel(const __grid_constant__ NormBackwardParams params) {
  constexpr int kColumns = kRunColumns<T>;
  using Sum = PartialSum<T>;
  const NormGradParams& g = params.gradient;
  const NormParams& p = g.forward;
  const int64_t count = params.sums.count, slice = blockIdx.x % count;
  const int64_t first = (blockIdx.x / count * kColumnThreads + threadIdx.x) * kColumns;
  if (first >= p.shape.width) return;
  const int columns = static_cast<int>(min_of<int64_t>(p.shape.width - first, kColumns));
  Sum dweight[kColumns] = {}, dbias[kColumns] = {};
  const int64_t* const strides[] = {p.input.stride, g.dnormalised.stride, p.statistics.stride};
#pragma unroll 2
  for (int64_t row = slice; row < p.shape.rows; row += count) {
    int64_t offset[3];
    row_offsets(p.shape, row, strides, offset);
    float x[kColumns], dy[kColumns];
    unpack(load_run<T, kColumns>(
               static_cast<const T*>(p.input.data) + offset[0] + first * p.input.step, p.input.step,
               params.whole.input, columns),
           x);
    unpack(load_run<O, kColumns>(
               static_cast<const O*>(g.dnormalised.data) + offset[1] + first * g.dnormalised.step,
               g.dnormalised.step, params.whole.dnormalised, columns),
           dy);
    const RowStatistics statistics =
        load_statistics(p.kind, static_cast<const float*>(p.statistics.data) + offset[2]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      dweight[c] = multiply_add(dy[c], statistics.normalise(x[c]), dweight[c]);
      dbias[c] += dy[c];
    }
  }
  const int64_t to = slice * params.sums.stride + first;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (c >= columns) continue;
    if (g.dweight != nullptr) static_cast<Sum*>(params.sums.weight)[to + c] = dweight[c];
    if (g.dbias != nullptr) static_cast<Sum*>(params.sums.bias)[to + c] = dbias[c];
  }
}

template <typename T, typename O>
cudaError_t launch_norm_column_sums(const NormBackwardParams& params, cudaStream_t stream) {
  const int64_t strips =
      ceil_div(params.gradient.forward.shape.width, kColumnThreads * kRunColumns<T>);
  return launch_blocks(norm_column_sums_kernel<T, O>, strips * params.sums.count, kColumnThreads, 0,
                       stream, params);
}

template <typename T>
FA_DEVICE void store_rounded(double x, T* to) {
  const float narrow = static_cast<float>(x);
  if constexpr (sizeof(T) == 2) {
    to->bits = static_cast<uint16_t>(ptx::pack(narrow, 0.0f, T{}));
  } else if constexpr (sizeof(T) == 4) {
    *to = narrow;
  } else {
    *to = x;
  }
}

// A block adds up 32 columns: each warp every so many of the partial sums, then one of them what
// the others have.
template <typename Sum>
FA_KERNEL(kAddThreads, 1)
void norm_add_partials_kernel(const __grid_constant__ NormBackwardParams params) {
  constexpr int kWarps = kAddThreads / ptx::kWarpSize;
  const NormGradParams& g = params.gradient;
  const int64_t width = g.forward.shape.width, strips = ceil_div(width, ptx::kWarpSize);
  const bool is_bias = g.dweight == nullptr || blockIdx.x >= strips;
  const int lane = ptx::lane_id(), warp = static_cast<int>(threadIdx.x) / ptx::kWarpSize;
  const int64_t column = blockIdx.x % strips * ptx::kWarpSize + lane;
  const void* const partials = is_bias ? params.sums.bias : params.sums.weight;
  double sum = 0;
  if (column < width) {
#pragma unroll 4
    for (int64_t i = warp; i < params.sums.count; i += kWarps) {
      sum += static_cast<const Sum*>(partials)[i * params.sums.stride + column];
    }
  }
  auto* const of_warps = static_cast<double*>(ptx::shared_memory());
  ptx::store_shared(of_warps + threadIdx.x, sum);
  ptx::sync_block();
  if (warp != 0 || column >= width) return;
  for (int w = 1; w < kWarps; ++w) {
    sum += ptx::load_shared(of_warps + w * ptx::kWarpSize + lane);
  }
  void* const out = is_bias ? g.dbias : g.dweight;
  switch (is_bias ? g.forward.bias_dtype : g.forward.weight_dtype) {
    case DType::kFloat32: store_rounded(sum, static_cast<float*>(out) + column); break;
    case DType::kBFloat16: store_rounded(sum, static_cast<bf16*>(out) + column); break;
    case DType::kFloat16: store_rounded(sum, static_cast<f16*>(out) + column); break;
    case DType::kFloat64: store_rounded(sum, static_cast<double*>(out) + column); break;
  }
}

template <typename Sum>
cudaError_t launch_norm_add_partials(const NormBackwardParams& params, cudaStream_t stream) {
  const NormGradParams& g = params.gradient;
  const int wanted = (g.dweight != nullptr) + (g.dbias != nullptr);
  const int64_t strips = ceil_div(g.forward.shape.width, ptx::kWarpSize);
  return launch_blocks(norm_add_partials_kernel<Sum>, strips * wanted, kAddThreads,
                       kAddThreads * sizeof(double), stream, params);
}

}  // namespace fastattn::cuda
