#include "../flash_combine.cuh"

#include "../decode_kernels.h"
#include "../device.cuh"

namespace fastattn::cuda {

template <typename T>
cudaError_t launch_flash_combine(const ForwardParams& params, cudaStream_t stream) {
  const AttentionParams& p = params.attention;
  const int64_t blocks = p.batch0 * p.batch1 * p.heads_q * p.seqlen_q;
  if (params.splits > kMaxSplits) return cudaErrorInvalidConfiguration;
  return launch_blocks(flash_combine<T>, blocks, kCombineThreads, sizeof(CombineShared), stream,
                       params);
}

template cudaError_t launch_flash_combine<float>(const ForwardParams&, cudaStream_t);
template cudaError_t launch_flash_combine<bf16>(const ForwardParams&, cudaStream_t);
template cudaError_t launch_flash_combine<f16>(const ForwardParams&, cudaStream_t);

}  // namespace fastattn::cuda
