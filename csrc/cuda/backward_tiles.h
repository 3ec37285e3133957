// Which tile each kernel of the backward pass takes: per dtype and head_dim, with the reason beside
// it (see tiles.h).
#pragma once

namespace fastattn::cuda {

// Of the gradients of keys and values: warps, 16-key tiles of a warp, queries of a step, those of
// them that a warp has the scores of at a time, steps in shared memory at a time.
struct DkDvTile {
  int warps, row_tiles, queries, part, stages;

  constexpr int keys() const {
    return 16 * warps * row_tiles;
  }
};

// Whether both gradients fit the registers of one kernel. At head_dim 256 one of them takes 128.
constexpr bool dkdv_in_one_pass(int head_dim) {
  return head_dim <= 128;
}

constexpr DkDvTile dkdv_tile(bool is_float32, int head_dim, bool has_terms) {
  if (is_float32) {
    if (head_dim <= 64) return {4, 1, 32, 32, 1};
    if (head_dim <= 128) return {4, 1, 16, 16, 1};
    return {2, 1, 16, 16, 1};
  }
  if (head_dim > 128) return {4, 1, 32, 32, 1};
  // dK and dV of 16 keys take 128 registers at head_dim 128: beside them 64 scores a row spill. At
  // head_dim 64, 32 keys a warp spill too.
  if (head_dim > 96) return {4, 1, 64, 32, 2};
  if (head_dim > 64) return {4, 1, 64, has_terms ? 32 : 64, 2};
  return {4, 1, 64, 64, 2};
}

// The same where the kernel adds dQ as well. Every tile of keys adds to all of dQ: the more keys,
// the fewer sums. 8 warps take 145 KB; where a chip has less, dQ has a kernel of its own.
constexpr DkDvTile dkdvdq_tile(int head_dim, bool has_terms) {
  DkDvTile tile = dkdv_tile(false, head_dim, has_terms);
  if (96 < head_dim && head_dim <= 128) tile.warps = 8;
  return tile;
}

// Of the kernels of Hopper: keys, and queries of a step.
struct BackwardTileSm90 {
  int keys, queries;
};

// Whether its warpgroups have a role each (flash_bwd_roles_sm90.cuh). With 64 keys each, dK and dV
// take head_dim of the 240 registers of a thread, scores and dP 64: beyond 128 that is too much,
// and terms of scores make it too much at 64 already.
constexpr bool has_roles_sm90(int head_dim, bool has_terms) {
  return head_dim > 128 || has_terms;
}

constexpr BackwardTileSm90 backward_tile_sm90(int head_dim, bool has_terms) {
  if (has_roles_sm90(head_dim, has_terms)) return {64, 64};
  return {128, head_dim > 64 ? 64 : 128};
}

// Of the gradients of queries: warps, 16-query tiles of a warp, keys of a step, steps in shared
// memory at a time.
struct DqTile {
  int warps, row_tiles, keys, stages;

  constexpr int queries() const {
    return 16 * warps * row_tiles;
  }
};

constexpr DqTile dq_tile(bool is_float32, int head_dim, bool has_terms) {
  if (is_float32) {
    if (head_dim <= 64) return {4, 1, 32, 1};
    if (head_dim <= 128) return {4, 1, 16, 1};
    return {2, 1, 16, 1};
  }
  if (head_dim > 128) return {4, 1, 32, 1};
  if (has_terms) return {4, 1, head_dim > 96 ? 32 : 64, 2};
  return {4, 2, 32, 2};
}

// Of the gradient of the bias: warps (16 queries each) and keys.
struct DbiasTile {
  int warps, keys;

  constexpr int queries() const {
    return 16 * warps;
  }
};

constexpr DbiasTile dbias_tile(bool is_float32, int head_dim) {
  if (!is_float32) return {4, head_dim > 128 ? 32 : 64};
  if (head_dim <= 64) return {4, 64};
  return head_dim <= 128 ? DbiasTile{4, 32} : DbiasTile{2, 16};
}

}  // namespace fastattn::cuda
