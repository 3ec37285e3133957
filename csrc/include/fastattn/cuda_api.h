// The functions of the CUDA backend. They return a status and never throw, exit or print. A stream
// is a cudaStream_t, as void*: no CUDA headers here.
#pragma once

#include "activation_params.h"
#include "kv_cache_params.h"
#include "norm_params.h"
#include "params.h"
#include "rope_params.h"

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
  const char* kernel;        // "sm80" or "sm90", what it is written for
  const char* why_not_sm90;  // nullptr where it is
};
ForwardChoice attention_choice(const AttentionParams& params, const Place& place);

// What attention_backward chooses, of the gradients whose data is not null.
struct BackwardChoice {
  bool is_fused;  // one kernel for dK, dV and dQ; else one for dK and dV and one for dQ
  const char* kernel;
  // nullptr where it is.
  const char *why_not_sm90, *why_not_fused;
};
BackwardChoice attention_backward_choice(const AttentionGradParams& params, const Place& place);

// For float32, bfloat16 and float16; as those of attention start work and return. The workspace is
// for dbias.
size_t activation_backward_workspace(const ActivationParams& params, const Place& place);
Status activation_forward(const ActivationParams& params, const Place& place);
Status activation_backward(const ActivationParams& params, void* workspace, const Place& place);

// Likewise. A token whose row is not one of the tables' becomes NaN, as far as it is rotated.
Status rope(const RopeParams& params, const Place& place);
// For an input of float32, bfloat16 or float16.
Status norm_forward(const NormParams& params, const Place& place);
size_t norm_backward_workspace(const NormGradParams& params, const Place& place);
Status norm_backward(const NormGradParams& params, void* workspace, const Place& place);
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
