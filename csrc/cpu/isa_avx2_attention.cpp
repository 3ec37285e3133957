// The avx2 level: AVX2 + FMA + F16C.
#include "attention_kernels.h"
#include "vec_avx2.h"

namespace fastattn::cpu {
namespace {

#include "attention.inc"

}  // namespace

const AttentionTable kAvx2Attention = {
    attention_kernels_of<VecAvx2, float>(),
    attention_kernels_of<VecAvx2, bf16>(),
    attention_kernels_of<VecAvx2, f16>(),
};

}  // namespace fastattn::cpu
