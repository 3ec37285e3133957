// The functions of the CUDA backend. They return a status and never throw, exit or print. A stream
// is a cudaStream_t, as void*: no CUDA headers here.
#pragma once

#include "kv_cache_params.h"
#include "params.h"

namespace fastattn::cuda {

// Where an op runs. The tensors are on that device, and so is what IndexArrays point to: the host
// has not checked their values.
struct Place {
  int32_t device;
  void* stream;
};

// Bytes of device memory that an op needs besides its tensors, 0 for none. They need no
// initialisation, and are free for others once the work in the stream is done.
size_t attention_forward_workspace(const AttentionParams& params, const Place& place);
size_t attention_backward_workspace(const AttentionGradParams& params, const Place& place);

// For float32, bfloat16 and float16, and for head_dim and head_dim_v of at most kMaxHeadDim. They
// start work in the stream and return: they neither synchronise nor allocate. Every row of the
// results is written, also packed rows that belong to no sequence (0; lse: -inf).
constexpr int64_t kMaxHeadDim = 256;
Status attention_forward(const AttentionParams& params, void* workspace, const Place& place);
Status attention_backward(const AttentionGradParams& params, void* workspace, const Place& place);

// What attention_forward chooses: the schedule ("tile", "split tile" or "decode"), and of its tiles
// the rows of queries, the keys, the heads that share one, and the parts of the keys.
struct ForwardChoice {
  const char* schedule;
  int32_t queries, keys, heads, parts;
};
ForwardChoice attention_choice(const AttentionParams& params, const Place& place);

// For the same dtypes. Starts work in the stream and returns; it needs no workspace.
Status kv_cache_update(const CacheWriteParams& params, const Place& place);

// What CUDA said about the last call in this thread that did not return Status::kOk.
const char* last_error();

struct ProbeResult {
  int32_t arch;       // what the code that ran was compiled for: 800, 900, ...
  const char* error;  // what failed, or nullptr
};

// Runs one warp on `device` in `stream`, waits for it, and checks what it wrote: proof that this
// build's kernels launch there. A diagnosis, not an op: it allocates and synchronises.
Status probe(int32_t device, void* stream, ProbeResult* result);

}  // namespace fastattn::cuda
