// The avx512bf16 level: the dot instructions of AVX512-BF16 for bfloat16, on top of avx512. Other
// dtypes run as at avx512.
#include "attention_kernels.h"
#include "vec_avx512_bf16.h"

namespace fastattn::cpu {
namespace {

#include "attention.inc"

#include "pack_pairs.inc"

#include "gemm_dot.inc"

#include "engine_pairs.inc"

#include "engine_pairs_bwd.inc"

}  // namespace

const AttentionKernels kDotAttentionBf16 =
    attention_kernels_of<VecAvx512, bf16, PairEngine<DotProduct>, PairBackwardEngine<DotProduct>>();

}  // namespace fastattn::cpu
