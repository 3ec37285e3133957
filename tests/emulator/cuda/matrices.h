// The arithmetic of the device that a CPU does not have as such.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "block.h"
#include "fastattn/types.h"

namespace fastattn::emulator {

// ---- Numbers ------------------------------------------------------------------------------------

inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float to_float(bf16 x) {
  return float_of_bits(static_cast<uint32_t>(x.bits) << 16);
}

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | magnitude << 13);
  if (magnitude >= 0x0400) return float_of_bits(sign | ((magnitude << 13) + 0x38000000));
  return float_of_bits(sign | bits_of_float(static_cast<float>(magnitude) * 0x1p-24f));
}

// To nearest even; every NaN is the same one.
inline uint32_t rounded_bits(float x, bf16) {
  const uint32_t bits = bits_of_float(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t rounded_bits(float x, f16) {
  const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (x != x) return 0x7fff;
  if (magnitude >= 0x47800000) return sign | 0x7c00;
  if (magnitude < 0x38800000) return sign | static_cast<uint32_t>(lrintf(fabsf(x) * 0x1p24f));
  return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

// ---- mma ----------------------------------------------------------------------------------------

// What a lane gives to mma.m16n8k16.
struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
inline void unpack(uint32_t word, double* pair) {
  pair[0] = static_cast<double>(to_float(T{static_cast<uint16_t>(word)}));
  pair[1] = static_cast<double>(to_float(T{static_cast<uint16_t>(word >> 16)}));
}

// 8 columns, in what vectors every machine has.
struct Row {
  using Pair [[gnu::vector_size(16)]] = double;
  Pair x[4];
};

// d += a b: products are exact, each sum is made in double, from d on by rising k, and rounded
// once.
template <typename T>
inline void multiply_matrices(void* const* operands) {
  static double a[16][16];
  static Row b[16], d[16];
  const auto given = [&](int lane) -> const MmaOperands& {
    return *static_cast<const MmaOperands*>(operands[lane]);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const float* const sums = given(lane).d;
    d[g].x[t] = Row::Pair{sums[0], sums[1]};
    d[g + 8].x[t] = Row::Pair{sums[2], sums[3]};
    for (int w = 0; w < 4; ++w) unpack<T>(given(lane).a[w], &a[g + w % 2 * 8][2 * t + w / 2 * 8]);
    for (int w = 0; w < 2; ++w) {
      double pair[2];
      unpack<T>(given(lane).b[w], pair);
      for (int e = 0; e < 2; ++e) b[2 * t + 8 * w + e].x[g / 2][g % 2] = pair[e];
    }
  }
  for (int row = 0; row < 16; ++row) {
    Row sum = d[row];
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 4; ++n) sum.x[n] += a[row][k] * b[k].x[n];
    }
    d[row] = sum;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int e = 0; e < 4; ++e) {
      given(lane).d[e] = static_cast<float>(d[lane / 4 + e / 2 * 8].x[lane % 4][e % 2]);
    }
  }
}

// ---- ldmatrix -----------------------------------------------------------------------------------

struct LdmatrixOperands {
  uint32_t* x;
  const void* row;
};

// Lane 8m + r gives row r of matrix m.
inline void load_matrices(void* const* operands) {
  for (int named = 0; named < kLanes; ++named) {
    const void* row = static_cast<const LdmatrixOperands*>(operands[named])->row;
    uint32_t words[4];
    memcpy(words, row, sizeof(words));
    for (int c = 0; c < 4; ++c) {
      const int lane = named % 8 * 4 + c;
      static_cast<const LdmatrixOperands*>(operands[lane])->x[named / 8] = words[c];
    }
  }
}

inline void load_transposed_matrices(void* const* operands) {
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      memcpy(matrix[r], static_cast<const LdmatrixOperands*>(operands[8 * m + r])->row, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int column = lane / 4, row = lane % 4 * 2;
      static_cast<const LdmatrixOperands*>(operands[lane])->x[m] =
          matrix[row][column] | static_cast<uint32_t>(matrix[row + 1][column]) << 16;
    }
  }
}

}  // namespace fastattn::emulator
