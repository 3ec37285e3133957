#include "tensor_map.h"

namespace fastattn::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function is asked for by name: a library linked against the driver's would not load
// where there is none.
cudaError_t find_encode(Encode* encode) {
  constexpr unsigned kIntroduced = 12000;  // CUDA 12.0
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &found, kIntroduced, cudaEnableDefault, &result);
  if (error != cudaSuccess) {
    cudaGetLastError();  // not to be found by the caller's next check
    return error;
  }
  if (result != cudaDriverEntryPointSuccess || found == nullptr) return cudaErrorNotSupported;
  *encode = reinterpret_cast<Encode>(found);
  return cudaSuccess;
}

CUtensorMapDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

}  // namespace

cudaError_t encode_tensor_map(TensorMap* map, const TensorBox& tensor) {
  static Encode encode = nullptr;
  static const cudaError_t found = find_encode(&encode);
  if (found != cudaSuccess) return found;
  constexpr int kMost = TensorBox::kMaxRank;
  cuuint64_t sizes[kMost], strides[kMost];
  cuuint32_t box[kMost], steps[kMost];
  for (int i = 0; i < tensor.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(tensor.sizes[i]);
    box[i] = static_cast<cuuint32_t>(tensor.box[i]);
    steps[i] = 1;
  }
  for (int i = 0; i + 1 < tensor.rank; ++i) {
    // Nothing moves along a dimension of size 1, but the driver refuses odd strides even there.
    strides[i] = sizes[i + 1] == 1 ? 16 : static_cast<cuuint64_t>(tensor.strides[i]);
  }
  const CUresult result = encode(
      map, type_of(tensor.dtype), static_cast<cuuint32_t>(tensor.rank),
      const_cast<void*>(tensor.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      tensor.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fastattn::cuda
