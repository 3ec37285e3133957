// The sums of dQ in a fixed order: of the tiles of keys that add to a part of them, each waits for
// the one before. What order blocks run in then changes no bit.
#pragma once

#include "dkdv_tile.cuh"
#include "ptx_sm90.cuh"

namespace fastattn::cuda {

// The tile of keys that a block takes. Where sums have an order, blocks take tiles as they begin,
// of each head the last one first: so a tile waits only for those of blocks that run already,
// whatever order a GPU starts blocks in. And under a causal mask a tile meets its first query when
// the one before is further already.
FA_DEVICE uint32_t key_tile_of_block(const BackwardParams& params) {
  if (params.dquery_turns == nullptr) return blockIdx.x;
  const uint32_t nth = ptx::fetch_add(params.begun, 1), tiles = params.tiles;
  return nth / tiles * tiles + (tiles - 1 - nth % tiles);
}

// The turn of 16 rows of the sums; two warps share them, each of which has other columns. It counts
// up from 0.
constexpr int kDqShares = 2;
FA_DEVICE int64_t dq_turn(int64_t row, int share) {
  return row / 16 * kDqShares + share;
}

// What a tile of keys knows of the order, in shared memory.
struct DqTurns {
  QueryBlocks before;  // of the tile before in the order
  uint32_t own;

  FA_DEVICE DqTurns(const BackwardParams& params, const DkDvPlan& plan, int keys, int queries)
      : before(params.gradient.forward, plan.seq, plan.first_key + keys, keys, queries),
        own(params.tiles - 1 - static_cast<uint32_t>(plan.first_key / keys)) {}

  // NOTE: who sees a tile of keys and the second one behind it, sees the one between them too. So
  // it is enough to wait for that.
  FA_DEVICE void await(const uint32_t* turn, int block) const {
    if (before.has(block)) ptx::await_global(turn, own);
  }
  // What this thread has added is there.
  FA_DEVICE void pass_on(uint32_t* turn) const {
    ptx::release_global(turn, own + 1);
  }
};

}  // namespace fastattn::cuda
