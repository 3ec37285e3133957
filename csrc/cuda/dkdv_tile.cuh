// What the kernels for the gradients of a tile of keys have in common around their products.
#pragma once

#include "backward_params.h"
#include "mma_tile.cuh"

namespace fastattn::cuda {

// Tiles of queries of which some see some of the keys of a tile.
struct QueryBlocks {
  int first = 0, last = 0;

  FA_DEVICE QueryBlocks() = default;
  FA_DEVICE QueryBlocks(const AttentionParams& p, const Sequence& seq, int64_t first_key, int keys,
                        int queries) {
    const Range tile = {first_key, min_of(first_key + keys, seq.len_k)};
    if (is_empty(tile)) return;
    const Range rows = intersect(rows_seeing_any(p, seq, tile), {0, seq.len_q});
    if (is_empty(rows)) return;
    first = static_cast<int>(rows.first / queries);
    last = static_cast<int>(ceil_div(rows.last, queries));
  }

  FA_DEVICE bool has(int block) const {
    return first <= block && block < last;
  }
};

// Which part of the problem a block has, in shared memory.
struct DkDvPlan {
  Sequence seq;
  int64_t head_kv, first_head, first_key;
  int group;  // heads that share these keys
  QueryBlocks blocks;
  int first_interior, last_interior;  // of these, those of which all see all

  // `tile`: of keys, of all heads and sequences one after the other.
  FA_DEVICE DkDvPlan(const BackwardParams& params, uint32_t tile, int keys, int queries) {
    const AttentionParams& p = params.gradient.forward;
    // Divisions are of 32 bits: those of 64 are calls.
    const uint32_t nth = tile % params.tiles, index = tile / params.tiles;
    const uint32_t heads = static_cast<uint32_t>(p.heads_kv);
    head_kv = index % heads;
    seq = sequence_at(p, index / heads);
    group = static_cast<int>(static_cast<uint32_t>(p.heads_q) / heads);
    first_head = head_kv * group;
    first_key = static_cast<int64_t>(nth) * keys;
    blocks = QueryBlocks(p, seq, first_key, keys, queries);
    const Range all = rows_seeing_all(p, seq, {first_key, first_key + keys});
    first_interior = static_cast<int>(ceil_div(max_of<int64_t>(all.first, 0), queries));
    last_interior = static_cast<int>(max_of<int64_t>(all.last, 0) / queries);
  }

  FA_DEVICE int steps() const {
    return group * (blocks.last - blocks.first);
  }

  struct Step {
    int head, block;  // of the group; a tile of queries
  };
  // Made from its number whenever it is needed: registers are for the tiles.
  FA_DEVICE Step step_of(int n) const {
    const uint32_t width = static_cast<uint32_t>(blocks.last - blocks.first);
    const int head = static_cast<int>(static_cast<uint32_t>(n) / width);
    return {head, blocks.first + n - head * static_cast<int>(width)};
  }
};

// Of the query that a column of transposed scores stands for; two neighbours are one load.
FA_DEVICE float of_column(const float* of_rows, int n, int e) {
  const float2 pair = ptx::load_shared(reinterpret_cast<const float2*>(of_rows + column_of(n, 0)));
  return e % 2 == 0 ? pair.x : pair.y;
}

// A gradient of the keys from `first_row` of the tile on, times `factor`.
template <typename T, int kM, int kN>
FA_DEVICE void store_key_rows(const Accumulator<kM, kN>& acc, const DkDvPlan& plan, int first_row,
                              const MutableTensor& to, bool is_paired, int64_t columns,
                              float factor) {
  const Sequence& seq = plan.seq;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t j = plan.first_key + first_row + row_of(m, 2 * half);
      if (j >= seq.rows_k) continue;
      T* row = static_cast<T*>(to.data) + offset_of(to.stride, seq.b0, seq.b1, plan.head_kv) +
               (seq.first_k + j) * to.stride[3];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float* pair = &acc.x[m][n][2 * half];
        store_pair(row, to.stride[4], is_paired, column_of(n, 0), columns, pair[0] * factor,
                   pair[1] * factor);
      }
    }
  }
}

}  // namespace fastattn::cuda
