// The amx level: AMX-BF16 tiles for bfloat16, on top of avx512bf16. Other dtypes run as at avx512.
#include "attention_kernels.h"
#include "tile_amx.h"

namespace fastattn::cpu {
namespace {

#include "attention.inc"

#include "pack_pairs.inc"

#include "gemm_amx.inc"

#include "engine_pairs.inc"

#include "decode_tiles.inc"

#include "engine_pairs_bwd.inc"

}  // namespace

const AttentionKernels kAmxAttentionBf16 =
    attention_kernels_of<VecAvx512, bf16, PairEngine<AmxProduct>, PairBackwardEngine<AmxProduct>,
                         TileDecode>();

}  // namespace fastattn::cpu
