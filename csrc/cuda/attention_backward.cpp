// The backward pass on the host: which kernels run, and over which workspace.
#include "backward_kernels.h"
#include "device.cuh"
#include "fastattn/cuda_api.h"
#include "layouts.h"
#include "unused_rows.h"

namespace fastattn::cuda {
namespace {

int64_t stats_rows(const AttentionParams& p) {
  return p.heads_q * padded_rows(p) + kRowSlack;
}

bool are_pairs(const AttentionParams& p, const MutableTensor& dkey, int64_t columns) {
  const int64_t sizes[4] = {p.batch0, p.batch1, p.heads_kv, max_of(p.seqlen_k, p.total_k)};
  return columns % 2 == 0 && is_aligned(dkey.data, dkey.stride, sizes, dtype_size(p.dtype), 2);
}

BackwardParams backward_params(const AttentionGradParams& g, void* workspace) {
  const AttentionParams& p = g.forward;
  BackwardParams params = {};
  params.gradient = g;
  params.query = query_layout(p, p.query, p.head_dim);
  params.key = key_layout(p, p.key, p.head_dim);
  params.value = key_layout(p, p.value, p.head_dim_v);
  params.out = query_layout(p, p.out, p.head_dim_v);
  params.dout = query_layout(p, g.dout, p.head_dim_v);
  params.has_paired_dquery = is_paired(p, g.dquery, p.head_dim);
  params.has_paired_dkey = are_pairs(p, g.dkey, p.head_dim);
  params.has_paired_dvalue = are_pairs(p, g.dvalue, p.head_dim_v);
  params.stats = static_cast<RowStats*>(workspace);
  params.padded_rows = padded_rows(p);
  return params;
}

template <typename T, typename Run>
cudaError_t run_for_head_dim(const AttentionParams& p, const Run& run) {
  switch (head_dim_of(p)) {
    case 64: return run.template operator()<T, 64>();
    case 96: return run.template operator()<T, 96>();
    case 128: return run.template operator()<T, 128>();
    default: return run.template operator()<T, 256>();
  }
}

// run<T, kHeadDim>()
template <typename Run>
cudaError_t run_for(const AttentionParams& p, const Run& run) {
  switch (p.dtype) {
    case DType::kBFloat16: return run_for_head_dim<bf16>(p, run);
    case DType::kFloat16: return run_for_head_dim<f16>(p, run);
    default: return run_for_head_dim<float>(p, run);
  }
}

// Zeros in the packed rows that belong to no sequence.
cudaError_t clear_unused(const AttentionParams& p, const MutableTensor& gradient, bool of_queries,
                         int64_t columns, cudaStream_t stream) {
  if (p.cu_seqlens_q.data == nullptr || gradient.data == nullptr) return cudaSuccess;
  return launch_fill_unused_rows(
      {gradient, static_cast<int32_t>(dtype_size(p.dtype)), 0, of_queries ? p.heads_q : p.heads_kv,
       of_queries ? p.total_q : p.total_k, columns, of_queries ? p.cu_seqlens_q : p.cu_seqlens_k,
       p.batch0},
      stream);
}

cudaError_t clear_unused_rows(const AttentionGradParams& g, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  cudaError_t error = clear_unused(p, g.dquery, true, p.head_dim, stream);
  if (error == cudaSuccess) error = clear_unused(p, g.dkey, false, p.head_dim, stream);
  if (error == cudaSuccess) error = clear_unused(p, g.dvalue, false, p.head_dim_v, stream);
  return error;
}

cudaError_t run_backward(const BackwardParams& params, cudaStream_t stream) {
  const AttentionGradParams& g = params.gradient;
  cudaError_t error = run_for(g.forward, [&]<typename T, int kHeadDim>() {
    cudaError_t status = launch_flash_bwd_prepare<T>(params, stream);
    if (status == cudaSuccess && g.dkey.data != nullptr) {
      status = launch_flash_bwd_dkdv_sm80<T, kHeadDim>(params, stream);
    }
    if (status == cudaSuccess && g.dquery.data != nullptr) {
      status = launch_flash_bwd_dq_sm80<T, kHeadDim>(params, stream);
    }
    if (status == cudaSuccess && g.dbias.data != nullptr) {
      status = launch_flash_bwd_dbias_sm80<T, kHeadDim>(params, stream);
    }
    return status;
  });
  if (error == cudaSuccess && g.dsink.data != nullptr) {
    error = launch_flash_bwd_sink(params, stream);
  }
  return error == cudaSuccess ? clear_unused_rows(g, stream) : error;
}

}  // namespace

size_t attention_backward_workspace(const AttentionGradParams& g, const Place& /*place*/) {
  return static_cast<size_t>(stats_rows(g.forward)) * sizeof(RowStats);
}

Status attention_backward(const AttentionGradParams& g, void* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  return status_of(
      run_backward(backward_params(g, workspace), static_cast<cudaStream_t>(place.stream)));
}

}  // namespace fastattn::cuda
