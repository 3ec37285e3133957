// What AVX512-BF16 adds to vec_avx512.h: rounding to bfloat16 in one instruction, and products of
// pairs. The instructions take subnormal numbers for zero.
//
// Pair operands: the left one is row-major bfloat16, read by pairs of neighbours. The right one
// lies in tiles of 32 rows and 16 columns, as 16 rows of 32-bit pairs: row r, column n is the pair
// of rows (2 r, 2 r + 1) of column n.
#pragma once

#include "vec_avx512.h"

namespace fastattn::cpu {
namespace {

constexpr int kTileColumns = 16, kTileDepth = 32;
constexpr int kTileElements = kTileColumns * kTileDepth;  // bfloat16 in one right operand tile

FA_INLINE __m256i round_to_bf16(VecAvx512 x) {
  return (__m256i)_mm512_cvtneps_pbh(x.v);
}

FA_INLINE void store_rounded(VecAvx512 x, bf16* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), round_to_bf16(x));
}

// One row of an operand tile: 16 pairs (low[n], high[n]).
FA_INLINE void store_pairs(VecAvx512 low, VecAvx512 high, bf16* out) {
  const __m512i low_bits = _mm512_cvtepu16_epi32(round_to_bf16(low));
  const __m512i high_bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(round_to_bf16(high)), 16);
  _mm512_storeu_si512(out, _mm512_or_si512(low_bits, high_bits));
}

// Sixteen pairs.
struct PairsAvx512 {
  __m512i v;

  static PairsAvx512 load(const bf16* p) {
    return {_mm512_loadu_si512(p)};
  }
  static PairsAvx512 broadcast(const bf16* pair) {
    int32_t bits;
    memcpy(&bits, pair, sizeof(bits));
    return {_mm512_set1_epi32(bits)};
  }
};

// sum[n] + a[n].low b[n].low + a[n].high b[n].high
FA_INLINE VecAvx512 dot(PairsAvx512 a, PairsAvx512 b, VecAvx512 sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}

}  // namespace
}  // namespace fastattn::cpu
