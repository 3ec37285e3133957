#include "../flash_decode_launch.cuh"

namespace fastattn::cuda {

template cudaError_t launch_flash_decode_sm80<bf16, 64>(ForwardParams, cudaStream_t);
template cudaError_t launch_flash_decode_sm80<bf16, 96>(ForwardParams, cudaStream_t);
template cudaError_t launch_flash_decode_sm80<bf16, 128>(ForwardParams, cudaStream_t);
template cudaError_t launch_flash_decode_sm80<bf16, 256>(ForwardParams, cudaStream_t);

}  // namespace fastattn::cuda
