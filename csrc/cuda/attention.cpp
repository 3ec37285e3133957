// The forward pass on the host: which schedule runs, in which tiles, over which workspace.
#include "device.cuh"
#include "fastattn/cuda_api.h"
#include "kernels.h"
#include "layouts.h"
#include "tiles.h"

namespace fastattn::cuda {
namespace {

enum class Schedule { kTile, kSplitTile, kDecode };

struct Choice {
  Schedule schedule;
  int pack, splits;
};

int64_t sequences_of(const AttentionParams& p) {
  return p.batch0 * p.batch1;
}

// Rows of queries whose keys are shared: those of all heads of a group.
int64_t shared_rows(const AttentionParams& p) {
  return p.heads_q / p.heads_kv * p.seqlen_q;
}

Choice choose(const AttentionParams& p, const DeviceLimits& /*limits*/) {
  const ForwardTile tile = forward_tile(p.dtype == DType::kFloat32, head_dim_of(p), has_terms(p));
  // Heads of a group share a tile that one of them would not fill.
  const bool packs = p.seqlen_q < tile.queries() && shared_rows(p) <= INT32_MAX;
  return {Schedule::kTile, packs ? static_cast<int>(p.heads_q / p.heads_kv) : 1, 1};
}

int64_t partial_rows(const AttentionParams& p) {
  return p.cu_seqlens_q.data != nullptr ? p.heads_q * p.total_q
                                        : sequences_of(p) * p.heads_q * p.seqlen_q;
}

size_t workspace_bytes(const AttentionParams& p, const Choice& choice) {
  if (choice.splits == 1) return 0;
  return static_cast<size_t>(choice.splits * partial_rows(p) * (p.head_dim_v + 1)) * sizeof(float);
}

ForwardParams forward_params(const AttentionParams& p, const Choice& choice, void* workspace) {
  ForwardParams params = {};
  params.attention = p;
  params.query = query_layout(p, p.query, p.head_dim);
  params.key = key_layout(p, p.key, p.head_dim);
  params.value = key_layout(p, p.value, p.head_dim_v);
  params.pack = choice.pack;
  params.splits = choice.splits;
  params.has_paired_out =
      choice.splits > 1 ? p.head_dim_v % 2 == 0 : is_paired(p, p.out, p.head_dim_v);
  params.partial_rows = partial_rows(p);
  params.partial_out = static_cast<float*>(workspace);
  params.partial_lse = params.partial_out + choice.splits * params.partial_rows * p.head_dim_v;
  return params;
}

template <typename T>
cudaError_t run_tiles_of(const ForwardParams& params, cudaStream_t stream) {
  switch (head_dim_of(params.attention)) {
    case 64: return launch_flash_fwd_sm80<T, 64>(params, stream);
    case 96: return launch_flash_fwd_sm80<T, 96>(params, stream);
    case 128: return launch_flash_fwd_sm80<T, 128>(params, stream);
    default: return launch_flash_fwd_sm80<T, 256>(params, stream);
  }
}

cudaError_t run_tiles(const ForwardParams& params, cudaStream_t stream) {
  switch (params.attention.dtype) {
    case DType::kBFloat16: return run_tiles_of<bf16>(params, stream);
    case DType::kFloat16: return run_tiles_of<f16>(params, stream);
    default: return run_tiles_of<float>(params, stream);
  }
}

}  // namespace

size_t attention_forward_workspace(const AttentionParams& p, const Place& place) {
  DeviceLimits limits = {};
  if (device_limits(place.device, &limits) != cudaSuccess) return 0;  // the op will say why
  return workspace_bytes(p, choose(p, limits));
}

Status attention_forward(const AttentionParams& p, void* workspace, const Place& place) {
  DeviceLimits limits = {};
  cudaError_t error = device_limits(place.device, &limits);
  if (error != cudaSuccess) return status_of(error);
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const ForwardParams params = forward_params(p, choose(p, limits), workspace);
  return status_of(run_tiles(params, static_cast<cudaStream_t>(place.stream)));
}

const char* attention_schedule(const AttentionParams& p, const Place& place) {
  DeviceLimits limits = {};
  device_limits(place.device, &limits);
  switch (choose(p, limits).schedule) {
    case Schedule::kTile: return "tile";
    case Schedule::kSplitTile: return "split tile";
    case Schedule::kDecode: return "decode";
  }
  return "";
}

}  // namespace fastattn::cuda
