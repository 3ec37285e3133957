#include "../kv_cache_update.cuh"

#include "../device.cuh"

namespace fastattn::cuda {

template <typename T>
cudaError_t launch_kv_cache_update(const CacheLaunch& params, bool by_packs, int64_t blocks,
                                   int threads, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto launch_stored_as = [&](auto stored) {
    using C = decltype(stored);
    const auto kernel = by_packs ? kv_cache_update<T, C, kWidth> : kv_cache_update<T, C, 1>;
    return launch_blocks(kernel, blocks, threads, 0, stream, params);
  };
  const bool int8 = params.write.update.k_scale.data != nullptr;
  return int8 ? launch_stored_as(int8_t{}) : launch_stored_as(T{});
}

#define FASTATTN_INSTANTIATE(T)                                                          \
  template cudaError_t launch_kv_cache_update<T>(const CacheLaunch&, bool, int64_t, int, \
                                                 cudaStream_t)
FASTATTN_INSTANTIATE(float);
FASTATTN_INSTANTIATE(bf16);
FASTATTN_INSTANTIATE(f16);
#undef FASTATTN_INSTANTIATE

}  // namespace fastattn::cuda
