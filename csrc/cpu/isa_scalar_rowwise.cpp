// Work on rows at the scalar level: plain C++ for any CPU; the only level with float64.
#include "rowwise_kernels.h"
#include "vec_scalar.h"
#include "vec_two.h"

namespace fastattn::cpu {
namespace {

#include "rowwise.inc"

}  // namespace

const RowwiseTable kScalarRowwise = {
    rowwise_kernels_of<ScalarVec<float>, float>(),
    rowwise_kernels_of<ScalarVec<float>, bf16>(),
    rowwise_kernels_of<ScalarVec<float>, f16>(),
};

const RowwiseKernels kScalarRowwiseF64 = rowwise_kernels_of<ScalarVec<double>, double>();

}  // namespace fastattn::cpu
