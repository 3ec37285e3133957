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

// Rounded to bfloat16, side by side.
FA_INLINE void store_rounded(VecAvx512 first, VecAvx512 second, bf16* out) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
}

// Where element i of 16 pairs comes from in two rows that lie one behind the other.
FA_INLINE __m512i interleaving() {
  return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                          6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
}

// One row of an operand tile: 16 pairs (low[n], high[n]).
FA_INLINE void store_pairs(VecAvx512 low, VecAvx512 high, bf16* out) {
  const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(rows, interleaving(), rows));
}

// Sixteen pairs, or 32 numbers side by side.
struct PairsAvx512 {
  __m512i v;

  static PairsAvx512 zero() {
    return {_mm512_setzero_si512()};
  }
  static PairsAvx512 load(const bf16* p) {
    return {_mm512_loadu_si512(p)};
  }
  // The first n numbers, zeros behind them.
  static PairsAvx512 load_n(const bf16* p, int n) {
    if (n >= 32) return load(p);
    return {_mm512_maskz_loadu_epi16((1u << n) - 1, p)};
  }
  static PairsAvx512 broadcast(const bf16* pair) {
    int32_t bits;
    memcpy(&bits, pair, sizeof(bits));
    return {_mm512_set1_epi32(bits)};
  }
  void store(bf16* p) const {
    _mm512_storeu_si512(p, v);
  }
};

// sum[n] + a[n].low b[n].low + a[n].high b[n].high
FA_INLINE VecAvx512 dot(PairsAvx512 a, PairsAvx512 b, VecAvx512 sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}

// Pair c of row r becomes pair r of row c.
FA_INLINE void transpose(PairsAvx512 (&x)[16]) {
  VecAvx512 square[16];
  for (int i = 0; i < 16; ++i) square[i].v = _mm512_castsi512_ps(x[i].v);
  transpose(square);
  for (int i = 0; i < 16; ++i) x[i].v = _mm512_castps_si512(square[i].v);
}

// Two rows of 32 numbers become the pairs (low[n], high[n]): the first 16 in low, the others in
// high.
FA_INLINE void interleave(PairsAvx512& low, PairsAvx512& high) {
  const __m512i numbers =
      _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                       37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i first = low.v, second = high.v;
  low.v = _mm512_permutex2var_epi16(first, numbers, second);
  high.v =
      _mm512_permutex2var_epi16(first, _mm512_add_epi16(numbers, _mm512_set1_epi16(16)), second);
}

// Whether all numbers that passed by were finite.
struct FinitePairsProbe {
  __m512i largest = _mm512_setzero_si512();
  void see(PairsAvx512 x) {
    const __m512i magnitude = _mm512_and_si512(x.v, _mm512_set1_epi16(0x7fff));
    largest = _mm512_max_epi16(largest, magnitude);
  }
  bool all_finite() const {
    return _mm512_cmpgt_epi16_mask(largest, _mm512_set1_epi16(0x7f7f)) == 0;
  }
};

}  // namespace
}  // namespace fastattn::cpu
