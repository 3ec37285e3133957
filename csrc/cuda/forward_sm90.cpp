// The forward kernel of Hopper on the host: what it takes, in which tiles, and where TMA finds it.
#include "forward_sm90.h"

#include "layouts.h"

namespace fastattn::cuda {
namespace {

#ifdef FASTATTN_WITH_SM90
constexpr bool kIsBuilt = true;
#else
constexpr bool kIsBuilt = false;
#endif

// The head dimensions of the kernel that takes these.
HeadDims head_dims_of(const AttentionParams& p) {
  for (const HeadDims& dims : kHeadDimsSm90) {
    if (p.head_dim <= dims.of_query && p.head_dim_v <= dims.of_value) return dims;
  }
  return {0, 0};
}

// A dimension of a tensor in memory, in elements.
struct Dimension {
  int64_t size, stride;
};

// TMA does not repeat what lies once.
template <typename View>
bool is_expanded(const View& tensor, const int64_t (&sizes)[4]) {
  bool expanded = false;
  for (int d = 0; d < 4; ++d) expanded |= sizes[d] > 1 && tensor.stride[d] == 0;
  return expanded;
}

// Of the dimensions (column, two more, batch1, batch0), boxes of `box` elements.
cudaError_t encode(TensorMap* map, const AttentionParams& p, const void* data,
                   const Dimension (&dimensions)[4], int64_t columns, const int (&box)[3]) {
  TensorBox tensor = {};
  tensor.dtype = p.dtype;
  tensor.rank = 5;
  tensor.data = data;
  tensor.sizes[0] = columns;
  tensor.box[0] = box[0];
  for (int d = 0; d < 4; ++d) {
    tensor.sizes[d + 1] = dimensions[d].size;
    tensor.strides[d] = dimensions[d].stride * static_cast<int64_t>(dtype_size(p.dtype));
    tensor.box[d + 1] = d < 2 ? box[d + 1] : 1;
  }
  tensor.swizzled = true;
  return encode_tensor_map(map, tensor);
}

// What the batch dimensions of a tensor are: packed rows have none.
Dimension batch0_of(const AttentionParams& p, const IndexArray& cu_seqlens, int64_t stride) {
  return cu_seqlens.data != nullptr ? Dimension{1, 0} : Dimension{p.batch0, stride};
}

int64_t rows_of(const IndexArray& cu_seqlens, int64_t total, int64_t each) {
  return cu_seqlens.data != nullptr ? total : each;
}

constexpr int kBoxColumns = 64;  // 128 bytes, what the swizzle allows

cudaError_t encode_query(TensorMap* map, const AttentionParams& p, int pack, int queries) {
  const int64_t (&s)[5] = p.query.stride;
  return encode(map, p, p.query.data,
                {{p.heads_q, s[2]},
                 {rows_of(p.cu_seqlens_q, p.total_q, p.seqlen_q), s[3]},
                 {p.batch1, s[1]},
                 batch0_of(p, p.cu_seqlens_q, s[0])},
                p.head_dim, {kBoxColumns, pack, queries / pack});
}

cudaError_t encode_keys(TensorMap* map, const AttentionParams& p, const ConstTensor& tensor,
                        int64_t columns, int keys) {
  const int64_t (&s)[5] = tensor.stride;
  return encode(map, p, tensor.data,
                {{rows_of(p.cu_seqlens_k, p.total_k, p.seqlen_k), s[3]},
                 {p.heads_kv, s[2]},
                 {p.batch1, s[1]},
                 batch0_of(p, p.cu_seqlens_k, s[0])},
                columns, {kBoxColumns, keys, 1});
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
  if (limits.arch != 90) return "the GPU is not of compute capability 9.0";
  if (!kIsBuilt) return "this build has no 90a in FASTATTN_CUDA_ARCHS";
  if (p.dtype == DType::kFloat32) return "float32";
  if (p.batch_invariant) return "batch_invariant: one schedule for every call";
  if (is_int8(p.cache)) return "an int8 cache";
  if (has_row_table(p.cache)) return "a paged cache, or a ring";
  if (p.seqlen_k == 0 || (p.cu_seqlens_k.data != nullptr && p.total_k == 0)) return "no keys";
  const int64_t query_sizes[4] = {p.batch0, p.batch1, p.heads_q, max_of(p.seqlen_q, p.total_q)};
  const int64_t key_sizes[4] = {p.batch0, p.batch1, p.heads_kv, max_of(p.seqlen_k, p.total_k)};
  if (!query_layout(p, p.query, p.head_dim).is_chunked ||
      !key_layout(p, p.key, p.head_dim).is_chunked ||
      !key_layout(p, p.value, p.head_dim_v).is_chunked) {
    return "query, key or value with rows that do not begin at multiples of 16 bytes";
  }
  if (is_expanded(p.query, query_sizes) || is_expanded(p.key, key_sizes) ||
      is_expanded(p.value, key_sizes)) {
    return "query, key or value expanded along a dimension";
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
  cudaError_t error = encode_query(&all.query_map, p, params.pack, tile.queries());
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
