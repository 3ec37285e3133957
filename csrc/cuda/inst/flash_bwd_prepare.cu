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
  return launch_blocks(flash_bwd_prepare<T>, blocks, kPrepareThreads, 0, stream, params);
}

template cudaError_t launch_flash_bwd_prepare<float>(BackwardParams, cudaStream_t);
template cudaError_t launch_flash_bwd_prepare<bf16>(BackwardParams, cudaStream_t);
template cudaError_t launch_flash_bwd_prepare<f16>(BackwardParams, cudaStream_t);

cudaError_t launch_flash_bwd_sink(const BackwardParams& params, cudaStream_t stream) {
  constexpr size_t kSharedBytes = kSinkThreads / ptx::kWarpSize * sizeof(double);
  return launch_blocks(flash_bwd_sink, params.gradient.forward.heads_q, kSinkThreads, kSharedBytes,
                       stream, params);
}

cudaError_t launch_fill_unused_rows(const UnusedRows& params, cudaStream_t stream) {
  const int64_t blocks = params.total == 0 ? 0 : params.heads * kFillBlocks;
  return launch_blocks(fill_unused_rows, blocks, kFillThreads, 0, stream, params);
}

}  // namespace fastattn::cuda
