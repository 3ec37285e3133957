// Cache writes on the host: how threads share the rows of a token.
#include "cache_kernels.h"
#include "device.cuh"
#include "fastattn/cuda_api.h"
#include "layouts.h"

namespace fastattn::cuda {
namespace {

int64_t pack_columns(const CacheWriteParams& p) {
  return 16 / static_cast<int64_t>(dtype_size(p.update.dtype));
}

int64_t tokens_of(const NewRows& rows) {
  if (rows.batch == 0) return 0;
  return is_packed(rows) ? rows.rows : rows.batch * rows.rows;
}

// Of key, value, query and what becomes of it.
template <typename View>
bool has_packs(const CacheWriteParams& p, const View& tensor, int64_t heads, int64_t columns) {
  if (tensor.data == nullptr) return true;
  const int64_t width = pack_columns(p), entries = is_packed(p.rows) ? 1 : p.rows.batch;
  return columns % width == 0 &&
         is_aligned(tensor.data, tensor.stride, {entries, 1, heads, p.rows.rows},
                    dtype_size(p.update.dtype), width);
}

// A pack of key is as many columns of an int8 cache.
bool has_packs(const CacheWriteParams& p, const MutableTensor& cache) {
  if (cache.data == nullptr) return true;
  const bool int8 = p.update.k_scale.data != nullptr;
  return is_aligned(cache.data, cache.stride, {p.entries, 1, p.update.heads_kv, p.cache_rows},
                    int8 ? 1 : dtype_size(p.update.dtype), pack_columns(p));
}

bool has_packs(const CacheWriteParams& p, const ConstTensor& table) {
  if (table.data == nullptr) return true;
  const size_t bytes = dtype_size(p.update.table_dtype);
  return bytes < 8 && is_aligned(table.data, table.stride, {1, 1, 1, p.table_rows}, bytes,
                                 16 / static_cast<int64_t>(bytes));
}

// Whether every access can be one of 16 bytes of key, and no pack of columns holds some of both
// halves of the pairs, or a part of a pair.
bool goes_by_packs(const CacheWriteParams& p) {
  const CacheUpdateParams& u = p.update;
  const int64_t piece = u.interleaved ? u.rotary_dim : u.rotary_dim / 2;
  return piece % pack_columns(p) == 0 && has_packs(p, u.cos) && has_packs(p, u.sin) &&
         has_packs(p, p.query, p.heads_q, u.head_dim) &&
         has_packs(p, p.rotated_query, p.heads_q, u.head_dim) &&
         has_packs(p, u.key, u.heads_kv, u.head_dim) &&
         has_packs(p, u.value, u.heads_kv, u.head_dim_v) && has_packs(p, u.k_cache) &&
         has_packs(p, u.v_cache);
}

// As many lanes as a row has packs, so that each of them has one: 16 at head_dim 128 in 16 bits,
// two rows a warp.
int lanes_of_row(const CacheWriteParams& p, int64_t width) {
  const int64_t packs = ceil_div(max_of(p.update.head_dim, p.update.head_dim_v), width);
  int lanes = 1;
  while (lanes < packs && lanes < 32) lanes *= 2;
  return lanes;
}

template <typename T>
cudaError_t run(const CacheWriteParams& p, cudaStream_t stream) {
  const bool by_packs = goes_by_packs(p);
  CacheLaunch launch = {p, lanes_of_row(p, by_packs ? pack_columns(p) : 1), 0};
  const int64_t rows = p.heads_q + 2 * p.update.heads_kv;  // of a token
  const int64_t warps = ceil_div(rows * launch.lanes, 32);
  if (warps == 0) return cudaSuccess;
  launch.token_blocks = static_cast<int32_t>(ceil_div(32 * warps, kMostCacheThreads));
  const int threads = static_cast<int>(32 * ceil_div(warps, launch.token_blocks));
  return launch_kv_cache_update<T>(launch, by_packs, tokens_of(p.rows) * launch.token_blocks,
                                   threads, stream);
}

}  // namespace

Status kv_cache_update(const CacheWriteParams& p, const Place& place) {
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(place.stream);
  switch (p.update.dtype) {
    case DType::kBFloat16: return status_of(run<bf16>(p, stream));
    case DType::kFloat16: return status_of(run<f16>(p, stream));
    default: return status_of(run<float>(p, stream));
  }
}

}  // namespace fastattn::cuda
