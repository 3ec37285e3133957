// The launchers of the backward pass that inst/*.cu hold. They set `tiles` themselves.
#pragma once

#include <cuda_runtime.h>

#include "backward_params.h"

namespace fastattn::cuda {

// T: float, bf16, f16; kHeadDim: one of kHeadDims.
template <typename T>
cudaError_t launch_flash_bwd_prepare(BackwardParams params, cudaStream_t stream);
template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_dkdv_sm80(BackwardParams params, cudaStream_t stream);
template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_dq_sm80(BackwardParams params, cudaStream_t stream);
template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_dbias_sm80(BackwardParams params, cudaStream_t stream);

// dK, dV and, into zeroed dquery_sums, dQ; T: bf16, f16. Then the bytes of shared memory that
// takes.
template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_dkdvdq_sm80(BackwardParams params, cudaStream_t stream);
// dQ from these sums.
template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_convert_dq(BackwardParams params, cudaStream_t stream);
template <typename T, int kHeadDim>
size_t dkdvdq_shared_bytes(bool has_terms);

cudaError_t launch_flash_bwd_sink(const BackwardParams& params, cudaStream_t stream);

}  // namespace fastattn::cuda
