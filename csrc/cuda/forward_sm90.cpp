// The forward kernel of Hopper on the host: what it takes, in which tiles, and where TMA finds it.
#include "forward_sm90.h"

#include "attention_maps.h"

namespace fastattn::cuda {
namespace {

// The head dimensions of the kernel that takes these.
HeadDims head_dims_of(const AttentionParams& p) {
  for (const HeadDims& dims : kHeadDimsSm90) {
    if (p.head_dim <= dims.of_query && p.head_dim_v <= dims.of_value) return dims;
  }
  return {0, 0};
}

// Half of the L2 cache of an H100: what else passes through it needs some as well.
constexpr int64_t kSectionBytes = 24 << 20;

TileSchedule schedule_of(const ForwardParams& params) {
  const AttentionParams& p = params.attention;
  const int64_t heads = p.batch0 * p.batch1 * (p.heads_q / params.pack) * params.splits;
  const int64_t bytes = max_of<int64_t>(p.seqlen_k, 1) * (p.head_dim + p.head_dim_v) *
                        static_cast<int64_t>(dtype_size(p.dtype));
  // Heads and parts that read the same keys, or share them, count once.
  const int64_t sharing = p.heads_q / p.heads_kv / params.pack * params.splits;
  const int64_t section = max_of<int64_t>(kSectionBytes / bytes, 1) * sharing;
  return {static_cast<uint32_t>(heads * params.tiles), static_cast<uint32_t>(params.tiles),
          static_cast<uint32_t>(min_of(section, heads))};
}

#ifdef FASTATTN_WITH_SM90

template <typename T>
cudaError_t launch(const ForwardParamsSm90& params, int most_blocks, cudaStream_t stream) {
  const HeadDims dims = head_dims_of(params.base.attention);
  switch (dims.of_query) {
    case 64: return launch_flash_fwd_sm90<T, 64, 64>(params, most_blocks, stream);
    case 96: return launch_flash_fwd_sm90<T, 96, 96>(params, most_blocks, stream);
    case 128: return launch_flash_fwd_sm90<T, 128, 128>(params, most_blocks, stream);
    case 192:
      return dims.of_value == 128 ? launch_flash_fwd_sm90<T, 192, 128>(params, most_blocks, stream)
                                  : launch_flash_fwd_sm90<T, 192, 192>(params, most_blocks, stream);
    default: return launch_flash_fwd_sm90<T, 256, 256>(params, most_blocks, stream);
  }
}

#endif

}  // namespace

const char* sm90_obstacle(const AttentionParams& p, const DeviceLimits& limits) {
  if (const char* obstacle = sm90_build_obstacle(limits)) return obstacle;
  if (p.dtype == DType::kFloat32) return "float32";
  if (p.batch_invariant) return "batch_invariant: one schedule for every call";
  if (is_int8(p.cache)) return "an int8 cache";
  if (rows_of_entry(p.cache) % 8 != 0) {
    return "pages, or a ring, whose number of rows is no multiple of 8";
  }
  if (has_row_table(p.cache) && p.cache.key_starts.data != nullptr) {
    return "pages, or a ring, with padding on the left";
  }
  if (p.seqlen_k == 0 || (p.cu_seqlens_k.data != nullptr && p.total_k == 0)) return "no keys";
  if (!takes_queries(p, p.query, p.head_dim) || !takes_keys(p, p.key, p.head_dim) ||
      !takes_keys(p, p.value, p.head_dim_v)) {
    return "query, key or value with rows that do not begin at multiples of 16 bytes, or expanded";
  }
  return nullptr;
}

ForwardTileSm90 sm90_tile(const AttentionParams& p) {
  return forward_tile_sm90(head_dims_of(p), has_terms(p));
}

cudaError_t run_flash_fwd_sm90([[maybe_unused]] ForwardParams params,
                               [[maybe_unused]] int multiprocessors,
                               [[maybe_unused]] cudaStream_t stream) {
#ifdef FASTATTN_WITH_SM90
  const AttentionParams& p = params.attention;
  const ForwardTileSm90 tile = sm90_tile(p);
  params.tiles = static_cast<int32_t>(ceil_div(p.seqlen_q * params.pack, tile.queries()));
  ForwardParamsSm90 all = {};
  all.base = params;
  all.schedule = schedule_of(params);
  if (all.schedule.count == 0) return cudaSuccess;
  all.query_rows = tile.queries() / params.pack * params.pack;
  all.box_rows = box_rows(p.cache, tile.keys);
  cudaError_t error =
      encode_queries(&all.query_map, p, p.query, p.head_dim, params.pack, all.query_rows);
  if (error == cudaSuccess) error = encode_keys(&all.key_map, p, p.key, p.head_dim, tile.keys);
  if (error == cudaSuccess)
    error = encode_keys(&all.value_map, p, p.value, p.head_dim_v, tile.keys);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::kBFloat16 ? launch<bf16>(all, multiprocessors, stream)
                                     : launch<f16>(all, multiprocessors, stream);
#else
  return cudaErrorNoKernelImageForDevice;
#endif
}

}  // namespace fastattn::cuda
