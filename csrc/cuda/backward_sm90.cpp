// The backward kernel of Hopper on the host: what it takes, and where TMA finds it.
#include "backward_sm90.h"

#include "attention_maps.h"

namespace fastattn::cuda {
namespace {

// The head_dim of the kernel that takes these.
int kernel_head_dim(const AttentionParams& p) {
  const int64_t widest = max_of(p.head_dim, p.head_dim_v);
  if (widest <= 128) return widest <= 64 ? 64 : widest <= 96 ? 96 : 128;
  return widest <= 192 && !has_terms(p) ? 192 : 256;
}

#ifdef FASTATTN_WITH_SM90

template <typename T>
cudaError_t launch_with_terms(const BackwardParamsSm90& params, cudaStream_t stream) {
  switch (kernel_head_dim(params.base.gradient.forward)) {
    case 64: return launch_flash_bwd_sm90<T, 64, 64, true>(params, stream);
    case 96: return launch_flash_bwd_sm90<T, 96, 96, true>(params, stream);
    case 128: return launch_flash_bwd_sm90<T, 128, 128, true>(params, stream);
    default: return launch_flash_bwd_sm90<T, 256, 256, true>(params, stream);
  }
}

template <typename T>
cudaError_t launch(const BackwardParamsSm90& params, cudaStream_t stream) {
  const AttentionParams& p = params.base.gradient.forward;
  if (has_terms(p)) return launch_with_terms<T>(params, stream);
  switch (kernel_head_dim(p)) {
    case 64: return launch_flash_bwd_sm90<T, 64, 64, false>(params, stream);
    case 96: return launch_flash_bwd_sm90<T, 96, 96, false>(params, stream);
    case 128: return launch_flash_bwd_sm90<T, 128, 128, false>(params, stream);
    case 192:
      return p.head_dim_v <= 128 ? launch_flash_bwd_sm90<T, 192, 128, false>(params, stream)
                                 : launch_flash_bwd_sm90<T, 192, 192, false>(params, stream);
    default: return launch_flash_bwd_sm90<T, 256, 256, false>(params, stream);
  }
}

cudaError_t encode_maps(BackwardParamsSm90* params, BackwardTileSm90 tile) {
  const AttentionGradParams& g = params->base.gradient;
  const AttentionParams& p = g.forward;
  cudaError_t error = encode_queries(&params->query_map, p, p.query, p.head_dim, 1, tile.queries);
  if (error == cudaSuccess) {
    error = encode_queries(&params->dout_map, p, g.dout, p.head_dim_v, 1, tile.queries);
  }
  if (error == cudaSuccess) {
    error = encode_keys(&params->key_map, p, p.key, p.head_dim, tile.keys);
  }
  if (error == cudaSuccess) {
    error = encode_keys(&params->value_map, p, p.value, p.head_dim_v, tile.keys);
  }
  return error;
}

#endif

}  // namespace

// NOTE: not batch_invariant, though its sums have an order: whether TMA can read a tensor depends
// on where its other sequences lie.
const char* backward_sm90_obstacle(const AttentionGradParams& g, const DeviceLimits& limits) {
  const AttentionParams& p = g.forward;
  if (const char* obstacle = sm90_build_obstacle(limits)) return obstacle;
  if (p.dtype == DType::kFloat32) return "float32";
  if (p.batch_invariant) return "batch_invariant: one kernel wherever tensors lie";
  if (g.dquery.data == nullptr || g.dkey.data == nullptr) {
    return "no gradient of query, or none of key and value: it computes all three";
  }
  if (p.seqlen_q == 0 || p.seqlen_k == 0) return "no queries, or no keys";
  if (!takes_queries(p, p.query, p.head_dim) || !takes_queries(p, g.dout, p.head_dim_v) ||
      !takes_keys(p, p.key, p.head_dim) || !takes_keys(p, p.value, p.head_dim_v)) {
    return "query, key, value or the gradient of the result with rows that do not begin at "
           "multiples of 16 bytes, or expanded";
  }
  return nullptr;
}

cudaError_t run_flash_bwd_sm90([[maybe_unused]] BackwardParams params,
                               [[maybe_unused]] cudaStream_t stream) {
#ifdef FASTATTN_WITH_SM90
  const AttentionParams& p = params.gradient.forward;
  BackwardParamsSm90 all = {};
  all.base = params;
  const BackwardTileSm90 tile = backward_tile_sm90(kernel_head_dim(p), has_terms(p));
  all.base.tiles = static_cast<int32_t>(ceil_div(p.seqlen_k, tile.keys));
  const cudaError_t error = encode_maps(&all, tile);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::kBFloat16 ? launch<bf16>(all, stream) : launch<f16>(all, stream);
#else
  return cudaErrorNoKernelImageForDevice;
#endif
}

}  // namespace fastattn::cuda
