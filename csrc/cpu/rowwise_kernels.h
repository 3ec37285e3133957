// The functions that each level exports for work on rows: norms, activations, rotary embedding,
// cache writes and linear layers.
#pragma once

#include "activation_kernels.h"
#include "kv_cache_kernels.h"
#include "linear_kernels.h"
#include "norm_kernels.h"
#include "rope_kernels.h"

namespace fastattn::cpu {

struct RowwiseKernels {
  NormKernels norm;
  ActivationKernels activation;
  RopeKernels rope;
  CacheKernels cache;
  LinearKernels linear;
};

// Each isa_<level>_rowwise.cpp defines its table as a constant.
struct RowwiseTable {
  RowwiseKernels f32, bf16, f16;
};

extern const RowwiseTable kScalarRowwise;
extern const RowwiseKernels kScalarRowwiseF64;
#if defined(__x86_64__)
extern const RowwiseTable kAvx2Rowwise;
extern const RowwiseTable kAvx512Rowwise;
#endif

// The table for this dtype at the active level (float64: always scalar).
const RowwiseKernels& rowwise_kernels(DType dtype);

}  // namespace fastattn::cpu
