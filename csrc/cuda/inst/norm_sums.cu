#include "../norm_sums.cuh"

namespace fastattn::cuda {

template cudaError_t launch_norm_column_sums<bf16, bf16>(const NormBackwardParams&, cudaStream_t);
template cudaError_t launch_norm_column_sums<bf16, float>(const NormBackwardParams&, cudaStream_t);
template cudaError_t launch_norm_column_sums<f16, f16>(const NormBackwardParams&, cudaStream_t);
template cudaError_t launch_norm_column_sums<f16, float>(const NormBackwardParams&, cudaStream_t);
template cudaError_t launch_norm_column_sums<float, float>(const NormBackwardParams&, cudaStream_t);

template cudaError_t launch_norm_add_partials<float>(const NormBackwardParams&, cudaStream_t);
template cudaError_t launch_norm_add_partials<double>(const NormBackwardParams&, cudaStream_t);

}  // namespace fastattn::cuda
