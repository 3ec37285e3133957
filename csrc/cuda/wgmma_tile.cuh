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

// A tile of whole panels; TMA fills what lies beyond kColumns with zeros.
//
// NOTE: a product takes whole panels of an operand down whose columns it sums, at head_dim 96 the
// zeros too: that it may end within a panel is said nowhere.
template <int kColumns>
constexpr int kWholePanels = (kColumns + kPanelElements - 1) / kPanelElements * kPanelElements;
template <typename T, int kRows, int kColumns>
using PanelTile = SharedTile<T, kRows, kWholePanels<kColumns>>;

// From one panel of a tile to the next.
template <typename Tile>
constexpr int kPanelStride = Tile::kRows * kPanelBytes;

// Eight rows of a panel, after which the next eight follow.
constexpr int kSwizzleAtom = 8 * kPanelBytes;

// Begins to load the rows of a box of TMA to row `row` on of a tile, a multiple of 8, panel by
// panel. `at`: the coordinates of the first one, in the order of the map (attention_maps.h),
// without the column.
template <typename Tile>
FA_DEVICE void load_panels(Tile& tile, int row, const TensorMap* map, const int (&at)[4],
                           ptx::Barrier* barrier) {
#pragma unroll
  for (int panel = 0; panel < Tile::kColumns / kPanelElements; ++panel) {
    ptx::tma_load<5>(tile.data + panel * (kPanelStride<Tile> / 2) + row * kPanelElements, map,
                     {panel * kPanelElements, at[0], at[1], at[2], at[3]}, barrier);
  }
}

// Begins to load a whole tile; `second`, `third`: the same coordinates. Packed rows, those with
// cu_seqlens, have one batch.
template <typename Tile>
FA_DEVICE void load_panels(Tile& tile, const TensorMap* map, const IndexArray& cu_seqlens,
                           int second, int third, const Sequence& seq, ptx::Barrier* barrier) {
  const int b1 = static_cast<int>(seq.b1);
  const int b0 = cu_seqlens.data != nullptr ? 0 : static_cast<int>(seq.b0);
  load_panels(tile, 0, map, {second, third, b1, b0}, barrier);
}

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

// acc = a b^T over kColumns columns: rows a_row to a_row + 63 of a against rows b_row to
// b_row + 8 kN - 1 of b.
template <int kColumns, int kN, typename TileA, typename TileB>
FA_DEVICE void begin_multiply_rows(Accumulator<1, kN>& acc, const TileA& a, int a_row,
                                   const TileB& b, int b_row = 0) {
  const uint64_t left = rows_operand(a, a_row), right = rows_operand(b, b_row);
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

// acc += left b: left's columns are rows b_row to b_row + 8 kK - 1 of b, and acc has its first 8 kN
// columns.
template <typename T, int kK, int kN, typename Tile>
FA_DEVICE void begin_multiply_columns(Accumulator<1, kN>& acc, const LeftOperand<T, 1, kK>& left,
                                      const Tile& b, int b_row = 0) {
  const uint64_t right = ptx::wgmma_advance(columns_operand(b, 0), b_row * kPanelBytes);
  ptx::wgmma_hold(acc.x[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kK / 2; ++k) {
    ptx::wgmma<ptx::Major::kMN, 8 * kN>(acc.x[0], left.x[0][k], columns_operand_step(right, k),
                                        true, T{});
  }
  ptx::wgmma_commit();
}

// acc = a^T b: columns 64 a_panel to 64 a_panel + 63 of a against columns 64 b_panel on of b.
template <int kN, typename TileA, typename TileB>
FA_DEVICE void begin_multiply_transposed(Accumulator<1, kN>& acc, const TileA& a, int a_panel,
                                         const TileB& b, int b_panel) {
  static_assert(TileA::kRows == TileB::kRows);
  const uint64_t left = columns_operand(a, a_panel), right = columns_operand(b, b_panel);
  ptx::wgmma_hold(acc.x[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < TileA::kRows / 16; ++k) {
    ptx::wgmma<ptx::Major::kMN, ptx::Major::kMN, 8 * kN>(acc.x[0], columns_operand_step(left, k),
                                                         columns_operand_step(right, k), k > 0,
                                                         typename TileA::Element{});
  }
  ptx::wgmma_commit();
}

// A left operand to rows first_row on and columns first_column (whole panels) on of a tile.
template <typename T, int kK, typename Tile>
FA_DEVICE void store_operand(const LeftOperand<T, 1, kK>& from, Tile& tile, int first_row,
                             int first_column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t start = ptx::shared_address(
        tile.at(first_row + row_of(0, 2 * half), first_column + column_of(0, 0)));
#pragma unroll
    for (int n = 0; n < kK; ++n) {
      ptx::store_shared(Tile::step(start, 0, n), from.x[0][n / 2][n % 2 * 2 + half]);
    }
  }
}

// All but the newest kPending products are done; acc is one of them.
template <int kPending, int kN>
FA_DEVICE void wait_for(Accumulator<1, kN>& acc) {
  ptx::wgmma_wait<kPending>();
  ptx::wgmma_hold(acc.x[0]);
}

}  // namespace fastattn::cuda
