// The avx512 level: AVX-512 F, BW, VL, DQ on top of avx2.
#include "attention_kernels.h"
#include "vec_avx512.h"

namespace fastattn::cpu {
namespace {

#include "attention.inc"

}  // namespace

const AttentionTable kAvx512Attention = {
    attention_kernels_of<VecAvx512, float>(),
    attention_kernels_of<VecAvx512, bf16>(),
    attention_kernels_of<VecAvx512, f16>(),
};

}  // namespace fastattn::cpu
