// The forward pass on the host: which schedule runs, in which tiles, over which workspace.
#include "decode_kernels.h"
#include "decode_tiles.h"
#include "device.cuh"
#include "fastattn/cuda_api.h"
#include "forward_sm90.h"
#include "kernels.h"
#include "layouts.h"
#include "tiles.h"
#include "unused_rows.h"

namespace fastattn::cuda {
namespace {

enum class Schedule { kTile, kSplitTile, kDecode };

struct Choice {
  Schedule schedule;
  int pack, splits;
  int queries, keys;  // of a tile
  bool on_sm90;       // by the kernel of Hopper
};

int64_t sequences_of(const AttentionParams& p) {
  return p.batch0 * p.batch1;
}

// Rows of queries whose keys are shared: those of all heads of a group.
int64_t shared_rows(const AttentionParams& p) {
  return p.heads_q / p.heads_kv * p.seqlen_q;
}

int element_bytes(const AttentionParams& p) {
  return static_cast<int>(dtype_size(p.dtype));
}

int stored_bytes(const AttentionParams& p) {
  return is_int8(p.cache) ? 1 : element_bytes(p);
}

DecodeTile decode_tile_of(const AttentionParams& p) {
  return decode_tile(element_bytes(p), stored_bytes(p), head_dim_of(p));
}

Choice choose_decode(const AttentionParams& p, const DeviceLimits& limits, bool takes_sm90) {
  Choice choice = {};
  choice.schedule = Schedule::kDecode;
  choice.pack = static_cast<int>(p.heads_q / p.heads_kv);
  choice.on_sm90 = decodes_on_sm90(shared_rows(p), takes_sm90);
  int blocks = 1;  // on a multiprocessor
  if (choice.on_sm90) {
    choice.queries = sm90_tile(p).queries(), choice.keys = sm90_tile(p).keys;
  } else {
    choice.queries = kDecodeRows, choice.keys = decode_tile_of(p).round_keys();
    blocks = decode_blocks(element_bytes(p), stored_bytes(p), head_dim_of(p), limits.shared_bytes);
  }
  const int64_t tiles = ceil_div(shared_rows(p), choice.queries) * p.heads_kv * sequences_of(p);
  const int64_t rounds = max_of<int64_t>(ceil_div(p.seqlen_k, choice.keys), 1);
  choice.splits = decode_splits({tiles, rounds}, {limits.multiprocessors, blocks});
  return choice;
}

// Heads of a group that share a tile, which one of them would not fill.
int pack_of(const AttentionParams& p, const Choice& choice) {
  if (p.seqlen_q >= choice.queries || shared_rows(p) > INT32_MAX) return 1;
  const int group = static_cast<int>(p.heads_q / p.heads_kv);
  // TMA brings whole queries, the last of which would reach into the next tile.
  const bool fits = choice.queries % group == 0 || shared_rows(p) <= choice.queries;
  return choice.on_sm90 && !fits ? 1 : group;
}

Choice choose(const AttentionParams& p, const DeviceLimits& limits) {
  const bool may_split = !p.batch_invariant && !p.for_backward;
  const bool takes_sm90 = sm90_obstacle(p, limits) == nullptr;
  if (may_split && p.dropout_p == 0 && is_decode(shared_rows(p), takes_sm90)) {
    return choose_decode(p, limits, takes_sm90);
  }
  Choice choice = {};
  choice.on_sm90 = takes_sm90;
  if (choice.on_sm90) {
    choice.queries = sm90_tile(p).queries(), choice.keys = sm90_tile(p).keys;
  } else {
    const ForwardTile tile = forward_tile(p.dtype == DType::kFloat32, head_dim_of(p), has_terms(p));
    choice.queries = tile.queries(), choice.keys = tile.keys;
  }
  choice.pack = pack_of(p, choice);
  const int64_t blocks = ceil_div(p.seqlen_q * choice.pack, choice.queries) *
                         (p.heads_q / choice.pack) * sequences_of(p);
  choice.splits =
      may_split ? forward_splits(blocks, p.seqlen_k / choice.keys, limits.multiprocessors) : 1;
  choice.schedule = choice.splits > 1 ? Schedule::kSplitTile : Schedule::kTile;
  return choice;
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
  params.out = query_layout(p, p.out, p.head_dim_v);
  params.pack = choice.pack;
  params.splits = choice.splits;
  params.has_paired_out =
      choice.splits > 1 ? p.head_dim_v % 2 == 0 : is_paired(p, p.out, p.head_dim_v);
  params.partial_rows = partial_rows(p);
  params.partial_out = static_cast<float*>(workspace);
  params.partial_lse = params.partial_out + choice.splits * params.partial_rows * p.head_dim_v;
  return params;
}

template <typename T, int kHeadDim>
cudaError_t run_on_sm80(const ForwardParams& params, Schedule schedule, cudaStream_t stream) {
  return schedule == Schedule::kDecode ? launch_flash_decode_sm80<T, kHeadDim>(params, stream)
                                       : launch_flash_fwd_sm80<T, kHeadDim>(params, stream);
}

template <typename T>
cudaError_t run_head_dim(const ForwardParams& params, Schedule schedule, cudaStream_t stream) {
  switch (head_dim_of(params.attention)) {
    case 64: return run_on_sm80<T, 64>(params, schedule, stream);
    case 96: return run_on_sm80<T, 96>(params, schedule, stream);
    case 128: return run_on_sm80<T, 128>(params, schedule, stream);
    default: return run_on_sm80<T, 256>(params, schedule, stream);
  }
}

template <typename T>
cudaError_t run(const ForwardParams& params, const Choice& choice, const DeviceLimits& limits,
                cudaStream_t stream) {
  const cudaError_t error = choice.on_sm90
                                ? run_flash_fwd_sm90(params, limits.multiprocessors, stream)
                                : run_head_dim<T>(params, choice.schedule, stream);
  if (error != cudaSuccess || params.splits == 1) return error;
  return launch_flash_combine<T>(params, stream);
}

cudaError_t run_dtype(const ForwardParams& params, const Choice& choice, const DeviceLimits& limits,
                      cudaStream_t stream) {
  switch (params.attention.dtype) {
    case DType::kBFloat16: return run<bf16>(params, choice, limits, stream);
    case DType::kFloat16: return run<f16>(params, choice, limits, stream);
    default: return run<float>(params, choice, limits, stream);
  }
}

// Rows of packed queries that no sequence has, or none within seqlen_q: out 0, lse -inf.
cudaError_t fill_unused(const AttentionParams& p, cudaStream_t stream) {
  if (p.cu_seqlens_q.data == nullptr) return cudaSuccess;
  constexpr uint32_t kZero = 0, kMinusInfinity = 0xff800000u;
  UnusedRows rows = {p.out,          static_cast<int32_t>(dtype_size(p.dtype)),
                     kZero,          p.heads_q,
                     p.total_q,      p.head_dim_v,
                     p.cu_seqlens_q, p.batch0,
                     p.seqlen_q};
  const cudaError_t error = launch_fill_unused_rows(rows, stream);
  if (error != cudaSuccess) return error;
  rows.tensor = p.lse;
  rows.element_bytes = sizeof(float), rows.bits = kMinusInfinity, rows.columns = 1;
  return launch_fill_unused_rows(rows, stream);
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
  const Choice choice = choose(p, limits);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  error = run_dtype(forward_params(p, choice, workspace), choice, limits, stream);
  return status_of(error == cudaSuccess ? fill_unused(p, stream) : error);
}

ForwardChoice attention_choice(const AttentionParams& p, const Place& place) {
  DeviceLimits limits = {};
  device_limits(place.device, &limits);
  const Choice choice = choose(p, limits);
  const char* const schedules[] = {"tile", "split tile", "decode"};
  const char* const obstacle = sm90_obstacle(p, limits);
  return {schedules[static_cast<int>(choice.schedule)],
          choice.queries,
          choice.keys,
          choice.pack,
          choice.splits,
          choice.on_sm90 ? "sm90" : "sm80",
          choice.on_sm90        ? nullptr
          : obstacle != nullptr ? obstacle
                                : "few queries: the decode kernel of sm80 is bound by memory there "
                                  "too"};
}

}  // namespace fastattn::cuda
