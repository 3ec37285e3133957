#include "../flash_bwd_launch.cuh"

namespace fastattn::cuda {

template cudaError_t launch_flash_bwd_dkdv_sm80<f16, 64>(BackwardParams, cudaStream_t);
template cudaError_t launch_flash_bwd_dq_sm80<f16, 64>(BackwardParams, cudaStream_t);
template cudaError_t launch_flash_bwd_dkdvdq_sm80<f16, 64>(BackwardParams, cudaStream_t);
template cudaError_t launch_flash_bwd_convert_dq<f16, 64>(BackwardParams, cudaStream_t);
template size_t dkdvdq_shared_bytes<f16, 64>(bool);
template cudaError_t launch_flash_bwd_dbias_sm80<f16, 64>(BackwardParams, cudaStream_t);

}  // namespace fastattn::cuda
