// Products of tiles. Their results lie in registers in the order of mma.m16n8k16, for every dtype:
// with g = lane / 4 and t = lane % 4, x[m][n] holds (16m + g, 8n + 2t), (.., 8n + 2t + 1),
// (16m + g + 8, 8n + 2t) and (.., 8n + 2t + 1) of the warp's part.
//
// 16-bit operands go to the matrix units. float32 is multiplied by FMA, so that it is float32.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace fastattn::cuda {

template <int kMTiles, int kNTiles>
struct Accumulator {
  static constexpr int kM = kMTiles, kN = kNTiles;
  float x[kM][kN][4];

  FA_DEVICE void set_zero() {
    for_each([](int, int, int, float& value) { value = 0.0f; });
  }

  // body(m, n, e, x[m][n][e])
  template <typename Body>
  FA_DEVICE void for_each(const Body& body) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) body(m, n, e, x[m][n][e]);
      }
    }
  }
};

// Where element (m, n, e) lies in the warp's part.
FA_DEVICE int row_of(int m, int e) {
  return 16 * m + ptx::lane_id() / 4 + (e >= 2 ? 8 : 0);
}
FA_DEVICE int column_of(int n, int e) {
  return 8 * n + ptx::lane_id() % 4 * 2 + (e & 1);
}

// An accumulator as the left operand of the next product.
template <typename T, int kM, int kN>
struct LeftOperand {
  static_assert(kN % 2 == 0);
  uint32_t x[kM][kN / 2][4];

  FA_DEVICE explicit LeftOperand(const Accumulator<kM, kN>& from) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float* pair = &from.x[m][2 * k + w / 2][w % 2 * 2];
          x[m][k][w] = ptx::pack(pair[0], pair[1], T{});
        }
      }
    }
  }
};

template <int kM, int kN>
struct LeftOperand<float, kM, kN> {
  const Accumulator<kM, kN>& from;
  FA_DEVICE explicit LeftOperand(const Accumulator<kM, kN>& accumulator) : from(accumulator) {}
};

// ---- 16 bits ------------------------------------------------------------------------------------

// Where a lane's ldmatrix begins: from the address of chunk (row, 0) of an operand, step() leads to
// the others. Each of these loads is one 16 x 16 of elements.

// Left operand: its rows are rows of the tile.
template <typename Tile>
FA_DEVICE uint32_t left_rows(const Tile& tile, int row) {
  const int lane = ptx::lane_id();
  return ptx::shared_address(tile.chunk(row + lane % 16, lane / 16));
}

// Left operand: its rows are columns of the tile (loaded with trans).
template <typename Tile>
FA_DEVICE uint32_t left_columns(const Tile& tile, int row) {
  const int lane = ptx::lane_id();
  return ptx::shared_address(tile.chunk(row + lane % 8 + lane / 16 * 8, lane / 8 % 2));
}

// Two right operands side by side: their columns are rows of the tile.
template <typename Tile>
FA_DEVICE uint32_t right_rows(const Tile& tile, int row) {
  const int lane = ptx::lane_id();
  return ptx::shared_address(tile.chunk(row + lane % 8 + lane / 16 * 8, lane / 8 % 2));
}

// Two right operands side by side: their columns are columns of the tile (loaded with trans).
template <typename Tile>
FA_DEVICE uint32_t right_columns(const Tile& tile, int row) {
  const int lane = ptx::lane_id();
  return ptx::shared_address(tile.chunk(row + lane % 16, lane / 16));
}

// ---- Products -----------------------------------------------------------------------------------

// acc += a b^T: rows a_row to a_row + 16 kM of a against rows b_row to b_row + 8 kN of b.
template <int kM, int kN, typename TileA, typename TileB>
FA_DEVICE void multiply_rows(Accumulator<kM, kN>& acc, const TileA& a, int a_row, const TileB& b,
                             int b_row) {
  using T = typename TileA::Element;
  static_assert(TileA::kColumns == TileB::kColumns);
  if constexpr (sizeof(T) == 2) {
    const uint32_t left_start = left_rows(a, a_row), right_start = right_rows(b, b_row);
#pragma unroll
    for (int k = 0; k < TileA::kColumns / 16; ++k) {
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::ldmatrix_x4(left[m], TileA::step(left_start, 16 * m, 2 * k));
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t right[4];
        ptx::ldmatrix_x4(right, TileB::step(right_start, 8 * n, 2 * k));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_m16n8k16(acc.x[m][n], left[m], right[0], right[1], T{});
          ptx::mma_m16n8k16(acc.x[m][n + 1], left[m], right[2], right[3], T{});
        }
      }
    }
  } else {
    multiply_rows_by_fma(acc, a, a_row, b, b_row);
  }
}

FA_DEVICE float dot(const float4& a, const float4& b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

template <int kM, int kN, typename TileA, typename TileB>
FA_DEVICE void multiply_rows_by_fma(Accumulator<kM, kN>& acc, const TileA& a, int a_row,
                                    const TileB& b, int b_row) {
  static_assert(TileA::kPanelChunks == TileB::kPanelChunks);
  const uint32_t left_start[2] = {ptx::shared_address(a.chunk(a_row + row_of(0, 0), 0)),
                                  ptx::shared_address(a.chunk(a_row + row_of(0, 2), 0))};
  const uint32_t right_start[2] = {ptx::shared_address(b.chunk(b_row + column_of(0, 0), 0)),
                                   ptx::shared_address(b.chunk(b_row + column_of(0, 1), 0))};
  constexpr int kPanel = TileA::kPanelChunks;
#pragma unroll 1
  for (int panel = 0; panel < TileA::kRowChunks / kPanel; ++panel) {
    const uint32_t left_panel = panel * TileA::kRows * kPanel * 16;
    const uint32_t right_panel = panel * TileB::kRows * kPanel * 16;
#pragma unroll
    for (int k = 0; k < kPanel; ++k) {
      float4 left[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          left[m][half] =
              ptx::load_shared<float4>(left_panel + TileA::step(left_start[half], 16 * m, k));
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float4 right[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          right[e] = ptx::load_shared<float4>(right_panel + TileB::step(right_start[e], 8 * n, k));
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc.x[m][n][e] = dot(left[m][e / 2], right[e % 2], acc.x[m][n][e]);
          }
        }
      }
    }
  }
}

// The places of a word whose numbers are not finite, as all ones.
template <typename T>
FA_DEVICE uint32_t nonfinite_mask(uint32_t word) {
  constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80u : 0x7c00u;
  const uint32_t low = (word & kExponent) == kExponent ? 0xffffu : 0u;
  const uint32_t high = (word >> 16 & kExponent) == kExponent ? 0xffff0000u : 0u;
  return low | high;
}

// 1 where a number of the word is not 0.
template <typename T>
FA_DEVICE uint32_t nonzero_as_one(uint32_t word) {
  const uint32_t ones = ptx::pack(1.0f, 1.0f, T{});
  const uint32_t low = (word & 0x7fffu) != 0 ? 0xffffu : 0u;
  const uint32_t high = (word & 0x7fff0000u) != 0 ? 0xffff0000u : 0u;
  return ones & (low | high);
}

// Whether 16 columns of b, in its rows 0 to 8 kK, hold infinity or NaN. Of the whole warp.
template <typename T, int kK, typename Tile>
FA_DEVICE bool columns_are_nonfinite(const Tile&, uint32_t start, int n) {
  uint32_t found = 0;
#pragma unroll
  for (int k = 0; k < kK / 2; ++k) {
    uint32_t right[4];
    ptx::ldmatrix_x4_trans(right, Tile::step(start, 16 * k, n));
#pragma unroll
    for (int w = 0; w < 4; ++w) found |= nonfinite_mask<T>(right[w]);
  }
  return ptx::any_in_warp(found != 0);
}

// NaN where a left number other than 0 meets an infinity or NaN of b.
template <typename T, int kM, int kK, int kN, typename Tile>
FA_DEVICE void spread_nonfinite(Accumulator<kM, kN>& acc, const LeftOperand<T, kM, kK>& left,
                                const Tile& b, int b_row) {
  const uint32_t start = right_columns(b, b_row), ones = ptx::pack(1.0f, 1.0f, T{});
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    if (!columns_are_nonfinite<T, kK>(b, start, n)) continue;
    Accumulator<kM, 2> hits;
    hits.set_zero();
#pragma unroll
    for (int k = 0; k < kK / 2; ++k) {
      uint32_t right[4];
      ptx::ldmatrix_x4_trans(right, Tile::step(start, 16 * k, n));
#pragma unroll
      for (int w = 0; w < 4; ++w) right[w] = ones & nonfinite_mask<T>(right[w]);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t counted[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) counted[w] = nonzero_as_one<T>(left.x[m][k][w]);
        ptx::mma_m16n8k16(hits.x[m][0], counted, right[0], right[1], T{});
        ptx::mma_m16n8k16(hits.x[m][1], counted, right[2], right[3], T{});
      }
    }
    hits.for_each([&](int m, int pair, int e, float& x) {
      if (x > 0) acc.x[m][n + pair][e] = __uint_as_float(0x7fffffffu);
    });
  }
}

// acc += left b: left's columns are rows b_row to b_row + 8 kK of b.
//
// kGuarded: an infinity or NaN of b reaches only what a left number other than 0 meets, so that
// what a hidden key holds reaches nobody.
template <bool kGuarded, typename T, int kM, int kK, int kN, typename Tile>
FA_DEVICE void multiply_columns(Accumulator<kM, kN>& acc, const LeftOperand<T, kM, kK>& left,
                                const Tile& b, int b_row = 0) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t start = right_columns(b, b_row);
#pragma unroll
    for (int k = 0; k < kK / 2; ++k) {
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t right[4];
        ptx::ldmatrix_x4_trans(right, Tile::step(start, 16 * k, n));
        if constexpr (kGuarded) {
#pragma unroll
          for (int w = 0; w < 4; ++w) right[w] &= ~nonfinite_mask<T>(right[w]);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_m16n8k16(acc.x[m][n], left.x[m][k], right[0], right[1], T{});
          ptx::mma_m16n8k16(acc.x[m][n + 1], left.x[m][k], right[2], right[3], T{});
        }
      }
    }
    if constexpr (kGuarded) spread_nonfinite(acc, left, b, b_row);
  } else {
    multiply_columns_by_fma<kGuarded>(acc, left.from, b, b_row);
  }
}

// Column k of `left` lies with one lane of four: it is handed to the others.
template <bool kGuarded, int kM, int kK, int kN, typename Tile>
FA_DEVICE void multiply_columns_by_fma(Accumulator<kM, kN>& acc, const Accumulator<kM, kK>& left,
                                       const Tile& b, int b_row) {
  const int first_lane = ptx::lane_id() & ~3;
  const uint32_t start = ptx::shared_address(b.at(b_row, column_of(0, 0)));
#pragma unroll
  for (int k = 0; k < 8 * kK; ++k) {
    float weight[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weight[m][half] = ptx::shuffle(left.x[m][k / 8][2 * half + k % 2], first_lane + k % 8 / 2);
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 right = ptx::load_shared<float2>(Tile::step(start, k, 2 * n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float w = weight[m][e / 2];
          const float sum = fmaf(w, e % 2 == 0 ? right.x : right.y, acc.x[m][n][e]);
          acc.x[m][n][e] = kGuarded && w == 0 ? acc.x[m][n][e] : sum;
        }
      }
    }
  }
}

// An accumulator, rounded, to rows first_row.. of a tile.
template <int kM, int kN, typename Tile>
FA_DEVICE void store_accumulator(const Accumulator<kM, kN>& acc, Tile& tile, int first_row) {
  using T = typename Tile::Element;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t start =
          ptx::shared_address(tile.at(first_row + row_of(m, 2 * half), column_of(0, 0)));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float* pair = &acc.x[m][n][2 * half];
        constexpr int kChunks = sizeof(T) / 2;  // of eight columns
        const uint32_t to = Tile::step(start, 0, kChunks * n);
        if constexpr (sizeof(T) == 4) {
          ptx::store_shared(to, float2{pair[0], pair[1]});
        } else {
          ptx::store_shared(to, ptx::pack(pair[0], pair[1], T{}));
        }
      }
    }
  }
}

}  // namespace fastattn::cuda
