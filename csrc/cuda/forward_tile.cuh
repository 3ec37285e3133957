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

  // `index`: of all heads, parts and tiles of queries.
  FA_DEVICE ForwardPlan(const ForwardParams& params, uint32_t index, int queries, int keys) {
    const AttentionParams& p = params.attention;
    // The last tiles first: under a causal mask they see the most keys.
    const int nth = params.tiles - 1 - static_cast<int>(index % params.tiles);
    index /= params.tiles;
    split = static_cast<int>(index % params.splits);
    index /= params.splits;
    const uint32_t heads = static_cast<uint32_t>(p.heads_q) / static_cast<uint32_t>(params.pack);
    tile = {index % heads * params.pack, static_cast<int64_t>(nth) * queries, params.pack};
    // Divisions are of 32 bits: those of 64 are calls.
    const uint32_t group = static_cast<uint32_t>(p.heads_q) / static_cast<uint32_t>(p.heads_kv);
    head_kv = static_cast<uint32_t>(tile.first_head) / group;
    seq = sequence_at(p, index / heads);
    set_blocks(params, queries, keys);
  }

 private:
  FA_DEVICE void set_blocks(const ForwardParams& params, int queries, int keys) {
    first_block = last_block = first_interior = last_interior = 0;
    const int64_t last = min_of(tile.first + queries, seq.len_q * tile.pack);
    if (tile.first >= last) return;
    const Range rows = {tile.query(0), tile.query(static_cast<int>(last - 1 - tile.first)) + 1};
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
template <Maximum kMaximum>
FA_DEVICE RowResult result_of_row(const ForwardParams& params, const Sequence& seq, int64_t head,
                                  int64_t i, float row_max, float row_sum) {
  if (i >= seq.len_q) return {0.0f, -infinity()};
  const bool is_partial = params.splits > 1;
  const float sink = is_partial ? -infinity() : sink_of(params.attention, head);
  return finalize_row<kMaximum>(row_max, row_sum, sink);
}

// Where element 0 of row i of a head lies in out or lse.
template <typename T>
FA_DEVICE T* row_of_result(const MutableTensor& tensor, const Sequence& seq, int64_t head,
                           int64_t i) {
  return static_cast<T*>(tensor.data) + offset_of(tensor.stride, seq.b0, seq.b1, head) +
         (seq.first_q + i) * tensor.stride[3];
}

// Where the partial result of row i of a head goes.
FA_DEVICE int64_t place_of_part(const ForwardParams& params, const ForwardPlan& plan, int64_t head,
                                int64_t i) {
  return plan.split * params.partial_rows +
         partial_row(params.attention, plan.seq.index, plan.seq.first_q, head, i);
}

FA_DEVICE void store_lse(const ForwardParams& params, const ForwardPlan& plan, int64_t head,
                         int64_t i, float lse) {
  if (params.splits > 1) {
    params.partial_lse[place_of_part(params, plan, head, i)] = lse;
  } else {
    *row_of_result<float>(params.attention.lse, plan.seq, head, i) = lse;
  }
}

// Dropout of weights.
template <int kM, int kN>
FA_DEVICE void drop_weights(Accumulator<kM, kN>& weights, const AttentionParams& p,
                            const ForwardPlan& plan, int first_row, int64_t j0) {
  if (p.dropout_p == 0) return;
  const Dropout dropout(p);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int r = first_row + row_of(m, e);
      const int64_t head = plan.seq.index * p.heads_q + plan.tile.head(r);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 keep = dropout.keep_pair(j0 + column_of(n, e), plan.tile.query(r), head);
        weights.x[m][n][e] *= keep.x;
        weights.x[m][n][e + 1] *= keep.y;
      }
    }
  }
}

// acc_o becomes the result, rows without keys 0, and their lse is stored.
template <int kM, int kN, Maximum kMaximum>
FA_DEVICE void finalize(Accumulator<kM, kN>& acc_o, const SoftmaxState<kM, kMaximum>& state,
                        const ForwardParams& params, const ForwardPlan& plan, int first_row) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float row_sum = sum_of_row(state.row_sum[m][half]);
      const int r = first_row + row_of(m, 2 * half);
      const int64_t i = plan.tile.query(r), head = plan.tile.head(r);
      const RowResult row =
          result_of_row<kMaximum>(params, plan.seq, head, i, state.row_max[m][half], row_sum);
      const bool stores_lse = ptx::lane_id() % 4 == 0 && i < plan.seq.rows_q;
      if (stores_lse) store_lse(params, plan, head, i, row.lse);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          float& x = acc_o.x[m][n][e];
          x = row.output_scale == 0 ? 0.0f : x * row.output_scale;
        }
      }
    }
  }
}

// The result of a part of the keys, in float32.
template <int kM, int kN>
FA_DEVICE void store_part(const Accumulator<kM, kN>& acc_o, const ForwardParams& params,
                          const ForwardPlan& plan, int first_row) {
  const int64_t columns = params.attention.head_dim_v;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first_row + row_of(m, 2 * half);
      const int64_t i = plan.tile.query(r);
      if (i >= plan.seq.rows_q) continue;
      float* out = params.partial_out + place_of_part(params, plan, plan.tile.head(r), i) * columns;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        store_pair(out, 1, params.has_paired_out, column_of(n, 0), columns, acc_o.x[m][n][2 * half],
                   acc_o.x[m][n][2 * half + 1]);
      }
    }
  }
}

// Calls body(out, stride) for row i of out, or of the partial results, which are float32.
template <typename T, typename Body>
FA_DEVICE void with_out_row(const ForwardParams& params, const ForwardPlan& plan, int64_t head,
                            int64_t i, const Body& body) {
  const AttentionParams& p = params.attention;
  if (params.splits > 1) {
    body(params.partial_out + place_of_part(params, plan, head, i) * p.head_dim_v, int64_t{1});
  } else {
    body(row_of_result<T>(p.out, plan.seq, head, i), p.out.stride[4]);
  }
}

}  // namespace fastattn::cuda
