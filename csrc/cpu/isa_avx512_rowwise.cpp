// Work on rows at the avx512 level: AVX-512 F, BW, VL, DQ on top of avx2.
#include "rowwise_kernels.h"
#include "vec_avx512.h"
#include "vec_two.h"

namespace fastattn::cpu {
namespace {

#include "rowwise.inc"

}  // namespace

const RowwiseTable kAvx512Rowwise = {
    rowwise_kernels_of<VecAvx512, float>(),
    rowwise_kernels_of<VecAvx512, bf16>(),
    rowwise_kernels_of<VecAvx512, f16>(),
};

}  // namespace fastattn::cpu
