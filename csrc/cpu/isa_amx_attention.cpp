// The amx level: AMX-BF16 tiles for bfloat16, and AVX512-BF16 to convert, on top of avx512.
#include "attention_kernels.h"
#include "tile_amx.h"

namespace fastattn::cpu {
namespace {

#include "attention.inc"

#include "pack_amx.inc"

#include "engine_amx.inc"

#include "engine_amx_bwd.inc"

}  // namespace

// float32 and float16 have no tile products of their own: they run as at the avx512 level.
const AttentionTable kAmxAttention = {
    attention_kernels_of<VecAvx512, float>(),
    attention_kernels_of<VecAvx512, bf16, AmxEngine, AmxBackwardEngine>(),
    attention_kernels_of<VecAvx512, f16>(),
};

}  // namespace fastattn::cpu
