// What the kernels of the forward pass have in common around their tiles of scores: which part of
// the problem a block has, what becomes of its scores, where its rows go.
#pragma once

#include "mask.cuh"

namespace fastattn::cuda {

// Which part of the problem a block has. It lies in shared memory: the registers are for the tiles.
struct ForwardPlan {
  Sequence seq;
  QueryTile tile;
  int64_t head_kv;
  int split;
  int first_block, last_block;        // tiles of keys that some row sees
  int first_interior, last_interior;  // of these, those that every row sees the whole of

  FA_DEVICE ForwardPlan(const ForwardParams& params, int queries, int keys) {
    const AttentionParams& p = params.attention;
    uint32_t index = blockIdx.x;
    // The last tiles first: under a causal mask they see the most keys.
    const int nth = params.tiles - 1 - static_cast<int>(index % params.tiles);
    index /= params.tiles;
    split = static_cast<int>(index % params.splits);
    index /= params.splits;
    const uint32_t heads = static_cast<uint32_t>(p.heads_q / params.pack);
    tile = {index % heads * params.pack, static_cast<int64_t>(nth) * queries, params.pack};
    head_kv = tile.first_head / (p.heads_q / p.heads_kv);
    seq = sequence_at(p, index / heads);
    set_blocks(params, queries, keys);
  }

 private:
  FA_DEVICE void set_blocks(const ForwardParams& params, int queries, int keys) {
    first_block = last_block = first_interior = last_interior = 0;
    const int64_t last = min_of(tile.first + queries, seq.len_q * tile.pack);
    if (tile.first >= last) return;
    const Range rows = {tile.first / tile.pack, (last - 1) / tile.pack + 1};
    const Range any = keys_seen_by_any(params.attention, seq, rows);
    const Range all = keys_seen_by_all(params.attention, seq, rows);
    if (is_empty(any)) return;
    const int first = static_cast<int>(any.first / keys);
    const int end = static_cast<int>(ceil_div(any.last, keys));
    const int share = (end - first + params.splits - 1) / params.splits;
    first_block = first + split * share;
    last_block = min_of(first_block + share, end);
    first_interior = static_cast<int>(ceil_div(max_of<int64_t>(all.first, 0), keys));
    last_interior = static_cast<int>(max_of<int64_t>(all.last, 0) / keys);
  }
};

// Products become scores: what ScoreTerms add to them. Rows of the warp begin at `first_row` of the
// tile, columns at key j0.
template <int kM, int kN>
FA_DEVICE void add_terms(Accumulator<kM, kN>& scores, const AttentionParams& p,
                         const ForwardPlan& plan, int first_row, int64_t j0) {
  const Sequence& seq = plan.seq;
  const ScoreTerms terms(p, seq);
  scores.for_each([&](int m, int n, int e, float& x) {
    const int r = first_row + row_of(m, e);
    const int64_t i = plan.tile.query(r), j = j0 + column_of(n, e);
    if (i < seq.len_q && j < seq.len_k) x = terms.score(x, plan.tile.head(r), i, j);
  });
}

// Hides the keys that a row does not see by position and length.
template <int kM, int kN>
FA_DEVICE void hide_keys(Accumulator<kM, kN>& scores, const AttentionParams& p,
                         const ForwardPlan& plan, int first_row, int64_t j0) {
  const Sequence& seq = plan.seq;
  hide_columns(scores, [&](int row) {
    const int64_t i = min_of(plan.tile.query(first_row + row), seq.len_q - 1);
    return columns_of(visible_keys(p, seq, i), j0, 8 * kN);
  });
}

// Scores, or weights, times what the rows of an int8 cache are multiplied by. A weight of 0 stays
// 0, whatever the scale of a hidden key is.
template <int kM, int kN>
FA_DEVICE void scale_columns(Accumulator<kM, kN>& scores, const float* scales) {
  scores.for_each([&](int, int n, int e, float& x) {
    const float scale = ptx::load_shared(scales + column_of(n, e));
    x = x == 0 ? 0.0f : x * scale;
  });
}

// The result of row i < rows_q of a head. Rows that take no part have none.
FA_DEVICE RowResult result_of_row(const ForwardParams& params, const Sequence& seq, int64_t head,
                                  int64_t i, float row_max, float row_sum) {
  if (i >= seq.len_q) return {0.0f, -infinity()};
  const bool is_partial = params.splits > 1;
  return finalize_row(row_max, row_sum, is_partial ? -infinity() : sink_of(params.attention, head));
}

// Where element 0 of row i of a head lies in out or lse.
template <typename T>
FA_DEVICE T* row_of_result(const MutableTensor& tensor, const Sequence& seq, int64_t head,
                           int64_t i) {
  return static_cast<T*>(tensor.data) + offset_of(tensor.stride, seq.b0, seq.b1, head) +
         (seq.first_q + i) * tensor.stride[3];
}

// Stores a row of out or of the partial results. for_each_pair(store) calls store(column, low,
// high) for this thread's share of the row, which `row` has yet to scale.
template <typename T, typename ForEachPair>
FA_DEVICE void store_row(const ForwardParams& params, const ForwardPlan& plan, int64_t head,
                         int64_t i, const RowResult& row, bool stores_lse,
                         const ForEachPair& for_each_pair) {
  const AttentionParams& p = params.attention;
  const auto store_columns = [&](auto* out, int64_t stride) {
    for_each_pair([&](int column, float low, float high) {
      // What a row without keys has gathered is not looked at.
      const bool is_empty = row.output_scale == 0;
      store_pair(out, stride, params.has_paired_out, column, p.head_dim_v,
                 is_empty ? 0.0f : low * row.output_scale,
                 is_empty ? 0.0f : high * row.output_scale);
    });
  };
  if (params.splits > 1) {
    const int64_t at = plan.split * params.partial_rows +
                       partial_row(p, plan.seq.index, plan.seq.first_q, head, i);
    if (stores_lse) params.partial_lse[at] = row.lse;
    store_columns(params.partial_out + at * p.head_dim_v, 1);
  } else {
    if (stores_lse) *row_of_result<float>(p.lse, plan.seq, head, i) = row.lse;
    store_columns(row_of_result<T>(p.out, plan.seq, head, i), p.out.stride[4]);
  }
}

}  // namespace fastattn::cuda
