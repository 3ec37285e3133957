// The backward pass on the host: which kernels run, and over which workspace.
#include <numbers>

#include "backward_kernels.h"
#include "backward_sm90.h"
#include "device.cuh"
#include "fastattn/cuda_api.h"
#include "layouts.h"
#include "unused_rows.h"

namespace fastattn::cuda {
namespace {

// Of row_lse, and of delta.
int64_t stats_rows(const AttentionParams& p) {
  return p.heads_q * padded_rows(p) + kRowSlack;
}

bool are_pairs(const AttentionParams& p, const MutableTensor& dkey, int64_t columns) {
  const int64_t sizes[4] = {p.batch0, p.batch1, p.heads_kv, max_of(p.seqlen_k, p.total_k)};
  return columns % 2 == 0 && is_aligned(dkey.data, dkey.stride, sizes, dtype_size(p.dtype), 2);
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

// Why no kernel of sm80 computes dK, dV and dQ at once, or nullptr where one does. Its sums of dQ
// have no fixed order.
const char* fused_obstacle(const AttentionGradParams& g, const DeviceLimits& limits) {
  const AttentionParams& p = g.forward;
  if (g.deterministic) return "deterministic: its sums of dQ have no fixed order";
  if (p.batch_invariant) return "batch_invariant: its sums of dQ have no fixed order";
  if (g.dquery.data == nullptr || g.dkey.data == nullptr) {
    return "no gradient of query, or none of key and value: it computes all three";
  }
  if (p.dtype == DType::kFloat32) return "float32";
  bool fits = false;
  run_for(p, [&]<typename T, int kHeadDim>() {
    if constexpr (sizeof(T) == 2) {
      fits = dkdvdq_shared_bytes<T, kHeadDim>(has_terms(p)) <=
             static_cast<size_t>(limits.shared_bytes);
    }
    return cudaSuccess;
  });
  return fits ? nullptr : "its tiles do not fit the shared memory of the GPU";
}

int64_t sums_of_dquery(const AttentionParams& p) {
  return p.heads_q * padded_rows(p) * head_dim_of(p);
}

// Of 16 rows two, of one warp each (see DqTurns); and before them, how many blocks have begun.
int64_t turns_of_dquery(const AttentionGradParams& g) {
  const AttentionParams& p = g.forward;
  return g.deterministic ? 1 + p.heads_q * padded_rows(p) / 16 * 2 : 0;
}

// Of both, which are zero at first.
size_t bytes_of_sums(const AttentionGradParams& g) {
  return static_cast<size_t>(sums_of_dquery(g.forward)) * sizeof(float) +
         static_cast<size_t>(turns_of_dquery(g)) * sizeof(uint32_t);
}

// Which kernels compute dK, dV and dQ.
enum class Way {
  kInOrder,  // one for dK and dV, one for dQ
  kFused,    // one that adds dQ to sums, in no order
  kSm90      // that of Hopper, in an order if need be
};

Way way_of(const AttentionGradParams& g, const DeviceLimits& limits) {
  if (backward_sm90_obstacle(g, limits) == nullptr) return Way::kSm90;
  return fused_obstacle(g, limits) == nullptr ? Way::kFused : Way::kInOrder;
}

BackwardParams backward_params(const AttentionGradParams& g, Way way, void* workspace) {
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
  params.scale = static_cast<float>(p.scale);
  params.inner_scale = p.softcap != 0 ? static_cast<float>(p.scale / p.softcap) : 0.0f;
  params.unit = (has_terms(p) ? 1.0f : params.scale) * std::numbers::log2e_v<float>;
  params.survivor = p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.0f;
  params.row_lse = static_cast<float*>(workspace);
  params.delta = params.row_lse + stats_rows(p);
  params.padded_rows = padded_rows(p);
  if (way == Way::kInOrder) return params;
  params.dquery_sums = params.delta + stats_rows(p);
  if (g.deterministic) {
    params.begun = reinterpret_cast<uint32_t*>(params.dquery_sums + sums_of_dquery(p));
    params.dquery_turns = params.begun + 1;
  }
  return params;
}

// Zeros in the packed rows that no kernel computes.
cudaError_t clear_unused(const AttentionParams& p, const MutableTensor& gradient, bool of_queries,
                         int64_t columns, cudaStream_t stream) {
  if (p.cu_seqlens_q.data == nullptr || gradient.data == nullptr) return cudaSuccess;
  return launch_fill_unused_rows(
      {gradient, static_cast<int32_t>(dtype_size(p.dtype)), 0, of_queries ? p.heads_q : p.heads_kv,
       of_queries ? p.total_q : p.total_k, columns, of_queries ? p.cu_seqlens_q : p.cu_seqlens_k,
       p.batch0, of_queries ? p.seqlen_q : p.seqlen_k},
      stream);
}

cudaError_t clear_unused_rows(const AttentionGradParams& g, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  cudaError_t error = clear_unused(p, g.dquery, true, p.head_dim, stream);
  if (error == cudaSuccess) error = clear_unused(p, g.dkey, false, p.head_dim, stream);
  if (error == cudaSuccess) error = clear_unused(p, g.dvalue, false, p.head_dim_v, stream);
  return error;
}

template <typename T, int kHeadDim>
cudaError_t run_with_sums(const BackwardParams& params, Way way, cudaStream_t stream) {
  const size_t bytes = bytes_of_sums(params.gradient);
  cudaError_t error = cudaMemsetAsync(params.dquery_sums, 0, bytes, stream);
  if (error != cudaSuccess) return error;
  error = way == Way::kSm90 ? run_flash_bwd_sm90(params, stream)
                            : launch_flash_bwd_dkdvdq_sm80<T, kHeadDim>(params, stream);
  return error == cudaSuccess ? launch_flash_bwd_convert_dq<T, kHeadDim>(params, stream) : error;
}

template <typename T, int kHeadDim>
cudaError_t run_in_order(const BackwardParams& params, cudaStream_t stream) {
  const AttentionGradParams& g = params.gradient;
  cudaError_t error = cudaSuccess;
  if (g.dkey.data != nullptr) error = launch_flash_bwd_dkdv_sm80<T, kHeadDim>(params, stream);
  if (error == cudaSuccess && g.dquery.data != nullptr) {
    error = launch_flash_bwd_dq_sm80<T, kHeadDim>(params, stream);
  }
  return error;
}

template <typename T, int kHeadDim>
cudaError_t run_kernels(const BackwardParams& params, Way way, cudaStream_t stream) {
  cudaError_t error = launch_flash_bwd_prepare<T>(params, stream);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(T) == 2) {
    error = way != Way::kInOrder ? run_with_sums<T, kHeadDim>(params, way, stream)
                                 : run_in_order<T, kHeadDim>(params, stream);
  } else {
    error = run_in_order<T, kHeadDim>(params, stream);
  }
  if (error == cudaSuccess && params.gradient.dbias.data != nullptr) {
    error = launch_flash_bwd_dbias_sm80<T, kHeadDim>(params, stream);
  }
  return error;
}

cudaError_t run_backward(const BackwardParams& params, Way way, cudaStream_t stream) {
  const AttentionGradParams& g = params.gradient;
  cudaError_t error = run_for(g.forward, [&]<typename T, int kHeadDim>() {
    return run_kernels<T, kHeadDim>(params, way, stream);
  });
  if (error == cudaSuccess && g.dsink.data != nullptr) {
    error = launch_flash_bwd_sink(params, stream);
  }
  return error == cudaSuccess ? clear_unused_rows(g, stream) : error;
}

}  // namespace

size_t attention_backward_workspace(const AttentionGradParams& g, const Place& place) {
  DeviceLimits limits = {};
  if (device_limits(place.device, &limits) != cudaSuccess) return 0;  // the op will say why
  const size_t stats = static_cast<size_t>(2 * stats_rows(g.forward)) * sizeof(float);
  return way_of(g, limits) == Way::kInOrder ? stats : stats + bytes_of_sums(g);
}

Status attention_backward(const AttentionGradParams& g, void* workspace, const Place& place) {
  DeviceLimits limits = {};
  const cudaError_t error = device_limits(place.device, &limits);
  if (error != cudaSuccess) return status_of(error);
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const Way way = way_of(g, limits);
  const BackwardParams params = backward_params(g, way, workspace);
  return status_of(run_backward(params, way, static_cast<cudaStream_t>(place.stream)));
}

BackwardChoice attention_backward_choice(const AttentionGradParams& g, const Place& place) {
  DeviceLimits limits = {};
  device_limits(place.device, &limits);
  const Way way = way_of(g, limits);
  return {way != Way::kInOrder, way == Way::kSm90 ? "sm90" : "sm80",
          backward_sm90_obstacle(g, limits),
          way == Way::kInOrder ? fused_obstacle(g, limits) : nullptr};
}

}  // namespace fastattn::cuda
