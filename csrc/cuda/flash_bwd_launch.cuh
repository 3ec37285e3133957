// Launches the backward kernels of a dtype and head_dim: the variants for the scores.
#pragma once

#include "backward_kernels.h"
#include "device.cuh"
#include "flash_bwd_convert_dq.cuh"
#include "flash_bwd_dbias_sm80.cuh"
#include "flash_bwd_dkdv_sm80.cuh"
#include "flash_bwd_dq_sm80.cuh"

namespace fastattn::cuda {

template <typename Config>
cudaError_t launch_dkdv(BackwardParams params, cudaStream_t stream) {
  const AttentionParams& p = params.gradient.forward;
  params.tiles = static_cast<int32_t>(ceil_div(p.seqlen_k, Config::kKeys));
  return launch_blocks(flash_bwd_dkdv_sm80<Config>, p.batch0 * p.batch1 * p.heads_kv * params.tiles,
                       Config::kThreads, sizeof(typename Config::Shared), stream, params);
}

// The kernels for dK, dV and, where it is wanted, dQ.
template <typename T, int kHeadDim, DkDvTile kTile, bool kTerms, bool kDq>
struct DkDvKernels {
  template <Gradients kWanted>
  using Config = DkDvConfig<T, kHeadDim, kTile, kTerms, kWanted>;
  using Whole = Config<Gradients{true, true, kDq}>;
  using Dk = Config<Gradients{true, false, kDq}>;
  using Dv = Config<Gradients{false, true, false}>;

  static cudaError_t run(const BackwardParams& params, cudaStream_t stream) {
    if constexpr (dkdv_in_one_pass(kHeadDim)) {
      return launch_dkdv<Whole>(params, stream);
    } else {
      const cudaError_t error = launch_dkdv<Dk>(params, stream);
      return error == cudaSuccess ? launch_dkdv<Dv>(params, stream) : error;
    }
  }
  static constexpr size_t shared_bytes() {
    if constexpr (dkdv_in_one_pass(kHeadDim)) {
      return sizeof(typename Whole::Shared);
    } else {
      return max_of(sizeof(typename Dk::Shared), sizeof(typename Dv::Shared));
    }
  }
};

template <typename T, int kHeadDim, bool kTerms>
using DkDvAlone =
    DkDvKernels<T, kHeadDim, dkdv_tile(sizeof(T) == 4, kHeadDim, kTerms), kTerms, false>;
template <typename T, int kHeadDim, bool kTerms>
using DkDvWithDq = DkDvKernels<T, kHeadDim, dkdvdq_tile(kHeadDim, kTerms), kTerms, true>;

template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_dkdv_sm80(BackwardParams params, cudaStream_t stream) {
  return has_terms(params.gradient.forward) ? DkDvAlone<T, kHeadDim, true>::run(params, stream)
                                            : DkDvAlone<T, kHeadDim, false>::run(params, stream);
}

template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_dkdvdq_sm80(BackwardParams params, cudaStream_t stream) {
  return has_terms(params.gradient.forward) ? DkDvWithDq<T, kHeadDim, true>::run(params, stream)
                                            : DkDvWithDq<T, kHeadDim, false>::run(params, stream);
}

template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_convert_dq(BackwardParams params, cudaStream_t stream) {
  const AttentionParams& p = params.gradient.forward;
  constexpr int kThreads = 32 * kConvertWarps, kRows = 16 * kConvertWarps;
  params.tiles = static_cast<int32_t>(ceil_div(p.seqlen_q, kRows));
  const int64_t blocks = p.batch0 * p.batch1 * p.heads_q * params.tiles;
  return launch_blocks(flash_bwd_convert_dq<T, kHeadDim>, blocks, kThreads, 0, stream, params);
}

template <typename T, int kHeadDim>
size_t dkdvdq_shared_bytes(bool has_terms) {
  return has_terms ? DkDvWithDq<T, kHeadDim, true>::shared_bytes()
                   : DkDvWithDq<T, kHeadDim, false>::shared_bytes();
}

template <typename T, int kHeadDim, bool kTerms>
cudaError_t launch_dq_variant(BackwardParams params, cudaStream_t stream) {
  using Config = DqConfig<T, kHeadDim, dq_tile(sizeof(T) == 4, kHeadDim, kTerms), kTerms>;
  const AttentionParams& p = params.gradient.forward;
  params.tiles = static_cast<int32_t>(ceil_div(p.seqlen_q, Config::kQueries));
  return launch_blocks(flash_bwd_dq_sm80<Config>, p.batch0 * p.batch1 * p.heads_q * params.tiles,
                       Config::kThreads, sizeof(typename Config::Shared), stream, params);
}

template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_dq_sm80(BackwardParams params, cudaStream_t stream) {
  return has_terms(params.gradient.forward) ? launch_dq_variant<T, kHeadDim, true>(params, stream)
                                            : launch_dq_variant<T, kHeadDim, false>(params, stream);
}

template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_dbias_sm80(BackwardParams params, cudaStream_t stream) {
  using Config = DbiasConfig<T, kHeadDim, dbias_tile(sizeof(T) == 4, kHeadDim)>;
  const AttentionParams& p = params.gradient.forward;
  const int64_t extents[5] = {p.batch0, p.batch1, p.heads_q, ceil_div(p.seqlen_q, Config::kQueries),
                              ceil_div(p.seqlen_k, Config::kKeys)};
  int64_t blocks = 1;
  for (int dim = 0; dim < 5; ++dim) {
    if (params.gradient.dbias.stride[dim] != 0) blocks *= extents[dim];
  }
  return launch_blocks(flash_bwd_dbias_sm80<Config>, blocks, Config::kThreads,
                       sizeof(typename Config::Shared), stream, params);
}

}  // namespace fastattn::cuda
