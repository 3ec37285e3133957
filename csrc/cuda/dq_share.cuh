// The part of dQ that a tile of keys gives, for the kernel that owns these keys: its warps hold
// dS^T by keys, and dQ = dS K takes it by queries. So dS^T goes through shared memory, each warp
// multiplies a part of dQ, and adds it to the sum over all tiles of keys in global memory.
#pragma once

#include "backward_params.h"
#include "mma_tile.cuh"

namespace fastattn::cuda {

// Which part of dQ a warp has: kM 16-row tiles of queries and kColumns columns.
template <int kHeadDim, int kWarps, int kQueries>
struct DqShare {
  // Two 16-row tiles share every fragment of K, where the columns can be dealt out to more warps:
  // those of 96 lie in panels that no two warps can share.
  static constexpr int kM = kHeadDim == 96 ? 1 : 2;
  static constexpr int kRowGroups = kQueries / (16 * kM), kColumnGroups = kWarps / kRowGroups;
  static constexpr int kColumns = kHeadDim / kColumnGroups;
  static_assert(kRowGroups * kColumnGroups == kWarps && kColumns % 16 == 0);

  int row, column;  // of the tile

  FA_DEVICE explicit DqShare(int warp)
      : row(warp % kRowGroups * 16 * kM), column(warp / kRowGroups * kColumns) {}
};

// acc += a^T b: columns a_column on of a against columns b_column on of b.
//
// kGuarded: infinities and NaN of b count as 0. Who saw such a key has a score, and so a dS, that
// is NaN without them; to all others the key is hidden.
template <bool kGuarded, int kM, int kN, typename TileA, typename TileB>
FA_DEVICE void multiply_transposed(Accumulator<kM, kN>& acc, const TileA& a, int a_column,
                                   const TileB& b, int b_column) {
  using T = typename TileA::Element;
  static_assert(TileA::kRows == TileB::kRows && kN % 2 == 0);
  const int lane = ptx::lane_id();
  const uint32_t left_start = ptx::shared_address(
      a.chunk(lane % 8 + lane / 16 * 8, a_column / TileA::kChunkColumns + lane / 8 % 2));
  const uint32_t right_start =
      ptx::shared_address(b.chunk(lane % 16, b_column / TileB::kChunkColumns + lane / 16));
#pragma unroll
  for (int k = 0; k < TileA::kRows / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ptx::ldmatrix_x4_trans(left[m], TileA::step(left_start, 16 * k, 2 * m));
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4_trans(right, TileB::step(right_start, 16 * k, n));
      if constexpr (kGuarded) {
#pragma unroll
        for (int w = 0; w < 4; ++w) right[w] &= ~nonfinite_mask<T>(right[w]);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16(acc.x[m][n], left[m], right[0], right[1], T{});
        ptx::mma_m16n8k16(acc.x[m][n + 1], left[m], right[2], right[3], T{});
      }
    }
  }
}

// Where the sum of dQ of 8 columns of 16 rows lies: in the order of an accumulator, so that a warp
// adds, or reads, 128 bytes at a time.
template <int kHeadDim>
FA_DEVICE float* dq_fragment(float* sums, int64_t row, int column) {
  return sums + (row / 16 * (kHeadDim / 8) + column / 8) * 128 + ptx::lane_id();
}

// Adds a warp's part to the sums; `row`: that of its first row, `count`: rows from there on that
// take part.
template <int kHeadDim, int kM, int kN>
FA_DEVICE void add_to_sums(float* sums, int64_t row, int64_t count, int column,
                           const Accumulator<kM, kN>& acc) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    if (16 * m >= count) return;  // these rows may be another sequence's
    float* to = dq_fragment<kHeadDim>(sums, row + 16 * m, column);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) ptx::add_to_global(to + 128 * n + 32 * e, acc.x[m][n][e]);
    }
  }
}

}  // namespace fastattn::cuda
