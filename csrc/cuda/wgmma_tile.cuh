// Products of tiles by a warpgroup. A SharedTile of 64-column panels is what TMA brings with the
// 128-byte swizzle and what wgmma reads; results lie in registers as those of mma_tile.cuh do, 16
// rows a warp, so that all that is made of them is one code.
//
// Each product is only begun: operands and accumulators are left alone until wgmma_wait and then
// wgmma_hold of the accumulators.
#pragma once

#include "mma_tile.cuh"
#include "ptx_sm90.cuh"

namespace fastattn::cuda {

constexpr int kPanelBytes = 128, kPanelElements = 64;  // of a row, in 16 bits

// From one panel of a tile to the next.
template <typename Tile>
constexpr int kPanelStride = Tile::kRows * kPanelBytes;

// Eight rows of a panel, after which the next eight follow.
constexpr int kSwizzleAtom = 8 * kPanelBytes;

// An operand along whose rows the sum runs: rows `row` on of a tile, the first panel.
template <typename Tile>
FA_DEVICE uint64_t rows_operand(const Tile& tile, int row) {
  static_assert(Tile::kPanelChunks * 16 == kPanelBytes && Tile::kRows % 8 == 0);
  return ptx::wgmma_descriptor(tile.data + row * kPanelElements, 0, kSwizzleAtom);
}

// From there, the columns of the k-th 16 elements of the sum.
template <typename Tile>
FA_DEVICE uint64_t rows_operand_step(uint64_t operand, int k) {
  return ptx::wgmma_advance(operand, k / 4 * kPanelStride<Tile> + k % 4 * 32);
}

// An operand down whose columns the sum runs: all columns from panel `panel` on.
template <typename Tile>
FA_DEVICE uint64_t columns_operand(const Tile& tile, int panel) {
  return ptx::wgmma_descriptor(tile.data + panel * (kPanelStride<Tile> / 2), kPanelStride<Tile>,
                               kSwizzleAtom);
}

// From there, rows 16 k to 16 k + 15.
FA_DEVICE uint64_t columns_operand_step(uint64_t operand, int k) {
  return ptx::wgmma_advance(operand, 2 * k * kSwizzleAtom);
}

// acc = a b^T over kColumns columns: rows a_row to a_row + 63 of a against rows 0 to 8 kN of b.
template <int kColumns, int kN, typename TileA, typename TileB>
FA_DEVICE void begin_multiply_rows(Accumulator<1, kN>& acc, const TileA& a, int a_row,
                                   const TileB& b) {
  const uint64_t left = rows_operand(a, a_row), right = rows_operand(b, 0);
  ptx::wgmma_hold(acc.x[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    ptx::wgmma<ptx::Major::kK, ptx::Major::kK, 8 * kN>(acc.x[0], rows_operand_step<TileA>(left, k),
                                                       rows_operand_step<TileB>(right, k), k > 0,
                                                       typename TileA::Element{});
  }
  ptx::wgmma_commit();
}

// acc += left b: left's columns are rows 0 to 8 kK of b, and acc has its first 8 kN columns.
template <typename T, int kK, int kN, typename Tile>
FA_DEVICE void begin_multiply_columns(Accumulator<1, kN>& acc, const LeftOperand<T, 1, kK>& left,
                                      const Tile& b) {
  const uint64_t right = columns_operand(b, 0);
  ptx::wgmma_hold(acc.x[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kK / 2; ++k) {
    ptx::wgmma<ptx::Major::kMN, 8 * kN>(acc.x[0], left.x[0][k], columns_operand_step(right, k),
                                        true, T{});
  }
  ptx::wgmma_commit();
}

// All but the newest kPending products are done; acc is one of them.
template <int kPending, int kN>
FA_DEVICE void wait_for(Accumulator<1, kN>& acc) {
  ptx::wgmma_wait<kPending>();
  ptx::wgmma_hold(acc.x[0]);
}

}  // namespace fastattn::cuda
