// Work on rows at the avx2 level: AVX2 + FMA + F16C.
#include "rowwise_kernels.h"
#include "vec_avx2.h"
#include "vec_two.h"

namespace fastattn::cpu {
namespace {

#include "rowwise.inc"

}  // namespace

const RowwiseTable kAvx2Rowwise = {
    rowwise_kernels_of<VecAvx2, float>(),
    rowwise_kernels_of<VecAvx2, bf16>(),
    rowwise_kernels_of<VecAvx2, f16>(),
};

}  // namespace fastattn::cpu
