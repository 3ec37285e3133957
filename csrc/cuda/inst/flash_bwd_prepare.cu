#include "../backward_kernels.h"
#include "../device.cuh"
#include "../fill_unused_rows.cuh"
#include "../flash_bwd_prepare.cuh"

namespace fastattn::cuda {

template <typename T>
cudaError_t launch_flash_bwd_prepare(BackwardParams params, cudaStream_t stream) {
  const AttentionParams& p = params.gradient.forward;
  params.tiles = static_cast<int32_t>(ceil_div(p.seqlen_q, kPrepareRows));
  const int64_t blocks = p.batch0 * p.batch1 * p.heads_q * params.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(flash_bwd_prepare<T>, {static_cast<unsigned>(blocks), kPrepareThreads, 0, stream},
                params);
}

template cudaError_t launch_flash_bwd_prepare<float>(BackwardParams, cudaStream_t);
template cudaError_t launch_flash_bwd_prepare<bf16>(BackwardParams, cudaStream_t);
template cudaError_t launch_flash_bwd_prepare<f16>(BackwardParams, cudaStream_t);

cudaError_t launch_flash_bwd_sink(const BackwardParams& params, cudaStream_t stream) {
  if (params.gradient.forward.heads_q == 0) return cudaSuccess;
  constexpr size_t kSharedBytes = kSinkThreads / ptx::kWarpSize * sizeof(double);
  return launch(
      flash_bwd_sink,
      {static_cast<unsigned>(params.gradient.forward.heads_q), kSinkThreads, kSharedBytes, stream},
      params);
}

cudaError_t launch_fill_unused_rows(const UnusedRows& params, cudaStream_t stream) {
  if (params.heads == 0 || params.total == 0) return cudaSuccess;
  return launch(fill_unused_rows,
                {static_cast<unsigned>(params.heads * kFillBlocks), kFillThreads, 0, stream},
                params);
}

}  // namespace fastattn::cuda
