// The scalar level: plain C++ for any CPU; the only level with float64.
#include "attention_kernels.h"
#include "vec_scalar.h"

namespace fastattn::cpu {
namespace {
#include "attention.inc"
}  // namespace

const AttentionTable kScalarAttention = {
    attention_kernels_of<ScalarVec<float>, float>(),
    attention_kernels_of<ScalarVec<float>, bf16>(),
    attention_kernels_of<ScalarVec<float>, f16>(),
};

const AttentionKernels kScalarAttentionF64 = attention_kernels_of<ScalarVec<double>, double>();

}  // namespace fastattn::cpu
