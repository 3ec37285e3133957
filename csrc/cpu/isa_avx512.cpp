// The avx512 level: AVX-512 F, BW, VL, DQ on top of avx2.
#include "kernels.h"
#include "vec_avx512.h"

namespace fastattn::cpu {
namespace {

#include "algorithms.inc"

}  // namespace

const LevelKernels kAvx512Kernels = {
    attention_kernels_of<VecAvx512, float>(),
    attention_kernels_of<VecAvx512, bf16>(),
    attention_kernels_of<VecAvx512, f16>(),
};

}  // namespace fastattn::cpu
