// Forward attention of one tile of query rows, by online softmax over tiles of keys (Dao, 2023,
// "FlashAttention-2"):
//
//   S = Q K^T;  m' = max(m, rowmax S);  P = exp(S - m')
//   l' = l exp(m - m') + rowsum P;  O' = O exp(m - m') + P V
//
// and at the end out = O / l, lse = m + log l. A warp owns 16 kM rows from the first product to the
// last. Two loads take turns: V of a step arrives under Q K^T, K of the next one under softmax and
// P V.
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

// C: what keys and values are stored as, T or int8_t. kTerms: scores need ScoreTerms, or dropout.
template <typename TypeT, typename TypeC, int kDim, int kNumWarps, int kRowTiles, int kNumKeys,
          bool kWithTerms>
struct ForwardConfig {
  using T = TypeT;
  using C = TypeC;
  static constexpr int kHeadDim = kDim, kWarps = kNumWarps, kThreads = 32 * kNumWarps;
  static constexpr int kM = kRowTiles, kQueries = 16 * kRowTiles * kNumWarps, kKeys = kNumKeys;
  static constexpr bool kTerms = kWithTerms, kInt8 = sizeof(C) == 1;

  struct Shared {
    ForwardPlan plan;
    SharedTile<T, kQueries, kHeadDim> query;
    SharedTile<T, kKeys, kHeadDim> key, value;
    float key_scale[kInt8 ? kKeys : 1], value_scale[kInt8 ? kKeys : 1];
  };
};

template <typename Config>
class FlashForward {
  using T = typename Config::T;
  using C = typename Config::C;
  static constexpr int kM = Config::kM, kKeys = Config::kKeys, kThreads = Config::kThreads;
  using Scores = Accumulator<kM, kKeys / 8>;
  using Output = Accumulator<kM, Config::kHeadDim / 8>;

 public:
  FA_DEVICE FlashForward(const ForwardParams& given, typename Config::Shared& memory)
      : params(given),
        p(given.attention),
        shared(memory),
        plan(memory.plan),
        seq(plan.seq),
        tile(plan.tile),
        thread(static_cast<int>(threadIdx.x)),
        warp_row(thread / 32 * 16 * kM) {}

  FA_DEVICE void run() {
    if (thread == 0) shared.plan = ForwardPlan(params, Config::kQueries, kKeys);
    ptx::sync_block();
    if (tile.first >= seq.rows_q * tile.pack) return;
    state.reset();
    acc_o.set_zero();
    const int last = plan.last_block;
    if (plan.first_block < last) {
      load_q_tile();
      load_k_tile(plan.first_block);
      for (int block = plan.first_block; block < last; ++block) {
        if (is_interior(block)) {
          step<false>(block, last);
        } else {
          step<true>(block, last);
        }
      }
    }
    store();
  }

 private:
  // Every row sees every key of the tile, and nothing else shapes the scores.
  FA_DEVICE bool is_interior(int block) const {
    return !Config::kTerms && plan.first_interior <= block && block < plan.last_interior;
  }

  template <bool kMasked>
  FA_DEVICE void step(int block, int last) {
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // K is there, and V of the step before is used up
    load_v_tile(block);
    Scores scores;
    scores.set_zero();
    multiply_rows(scores, shared.query, warp_row, shared.key, 0);
    if constexpr (Config::kInt8) scale_columns(scores, shared.key_scale);
    if constexpr (kMasked) mask_tile(scores, block);
    ptx::cp_async_wait<0>();
    bool may_leak = false;  // does V hold what must not reach the rows that do not see it?
    if constexpr (kMasked) {
      may_leak = ptx::sync_block_or(share_is_nonfinite<kThreads>(shared.value, thread));
    } else {
      ptx::sync_block();
    }
    // V is there, and K is used up.
    state.step(scores, unit(), acc_o);
    if constexpr (Config::kTerms) drop(scores, block);
    if constexpr (Config::kInt8) scale_columns(scores, shared.value_scale);
    const LeftOperand<T, kM, kKeys / 8> weights(scores);
    // Now and not before softmax: scores and a load together would not fit the registers.
    if (block + 1 < last) load_k_tile(block + 1);
    if (kMasked && may_leak) {
      multiply_columns<true>(acc_o, weights, shared.value);
    } else {
      multiply_columns<false>(acc_o, weights, shared.value);
    }
  }

  FA_DEVICE float unit() const {
    return Config::kTerms ? kLog2e : static_cast<float>(p.scale) * kLog2e;
  }

  FA_DEVICE void load_q_tile() {
    load_tile<kThreads>(shared.query, thread, params.query,
                        QueryTileRows<T>(p.query, seq, tile, seq.len_q));
    ptx::cp_async_commit();
  }

  FA_DEVICE void load_k_tile(int block) {
    load_kv_tile(shared.key, shared.key_scale, p.key, p.cache.key_scale, params.key, block);
  }
  FA_DEVICE void load_v_tile(int block) {
    load_kv_tile(shared.value, shared.value_scale, p.value, p.cache.value_scale, params.value,
                 block);
  }

  template <typename Tile>
  FA_DEVICE void load_kv_tile(Tile& to, float* scales, const ConstTensor& tensor,
                              const ConstTensor& scale, const ColumnLayout& layout, int block) {
    const KeyRows<C> rows(p, tensor, seq, plan.head_kv);
    const Range keys = {seq.first_seen, seq.len_k};
    load_tile<kThreads>(to, thread, layout, KeyTileRows<C>{rows, origin_of(block), keys});
    ptx::cp_async_commit();
    if constexpr (Config::kInt8) {
      const KeyRows<float> row_scales(p, scale, seq, plan.head_kv);
      const KeyTileRows<float> of_tile{row_scales, origin_of(block), keys};
      if (thread < kKeys) {
        const float* at = of_tile(thread);
        ptx::store_shared(scales + thread, at == nullptr ? 0.0f : *at);
      }
    }
  }

  FA_DEVICE int64_t origin_of(int block) const {
    return static_cast<int64_t>(block) * kKeys;
  }

  // A weight of 0 stays 0, whatever the scale of a hidden key is.
  FA_DEVICE void scale_columns(Scores& scores, const float* scales) const {
    scores.for_each([&](int, int n, int e, float& x) {
      const float scale = ptx::load_shared(scales + column_of(n, e));
      x = x == 0 ? 0.0f : x * scale;
    });
  }

  FA_DEVICE void mask_tile(Scores& scores, int block) const {
    const int64_t j0 = origin_of(block);
    if constexpr (Config::kTerms) {
      const ScoreTerms terms(p, seq);
      scores.for_each([&](int m, int n, int e, float& x) {
        const int r = warp_row + row_of(m, e);
        const int64_t i = tile.query(r), j = j0 + column_of(n, e);
        if (i < seq.len_q && j < seq.len_k) x = terms.score(x, tile.head(r), i, j);
      });
    }
    hide_columns(scores, [&](int row) {
      const int64_t i = min_of(tile.query(warp_row + row), seq.len_q - 1);
      return columns_of(visible_keys(p, seq, i), j0, kKeys);
    });
  }

  FA_DEVICE void drop(Scores& weights, int block) const {
    if (p.dropout_p == 0) return;
    const int64_t j0 = origin_of(block);
    const Dropout dropout(p);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int r = warp_row + row_of(m, e);
        const int64_t head = seq.index * p.heads_q + tile.head(r);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const float2 keep = dropout.keep_pair(j0 + column_of(n, e), tile.query(r), head);
          weights.x[m][n][e] *= keep.x;
          weights.x[m][n][e + 1] *= keep.y;
        }
      }
    }
  }

  FA_DEVICE void store() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float row_sum = sum_of_row(state.row_sum[m][half]);
        const int r = warp_row + row_of(m, 2 * half);
        const int64_t i = tile.query(r), head = tile.head(r);
        if (i >= seq.rows_q) continue;
        const float sink = params.splits == 1 ? sink_of(p, head) : -infinity();
        const RowResult row = finalize_row(state.row_max[m][half], row_sum, sink);
        store_row(m, half, head, i, row);
      }
    }
  }

  FA_DEVICE void store_row(int m, int half, int64_t head, int64_t i, const RowResult& row) {
    const bool is_partial = params.splits > 1;
    const bool stores_lse = ptx::lane_id() % 4 == 0;
    if (is_partial) {
      const int64_t at =
          plan.split * params.partial_rows + partial_row(p, seq.index, seq.first_q, head, i);
      if (stores_lse) params.partial_lse[at] = row.lse;
      store_columns(params.partial_out + at * p.head_dim_v, 1, m, half, row);
      return;
    }
    const int64_t place =
        offset_of(p.lse.stride, seq.b0, seq.b1, head) + (seq.first_q + i) * p.lse.stride[3];
    if (stores_lse) static_cast<float*>(p.lse.data)[place] = row.lse;
    store_columns(static_cast<T*>(p.out.data) + offset_of(p.out.stride, seq.b0, seq.b1, head) +
                      (seq.first_q + i) * p.out.stride[3],
                  p.out.stride[4], m, half, row);
  }

  template <typename Out>
  FA_DEVICE void store_columns(Out* out, int64_t stride, int m, int half, const RowResult& row) {
#pragma unroll
    for (int n = 0; n < Output::kN; ++n) {
      const float* pair = &acc_o.x[m][n][2 * half];
      // What a row without keys has gathered is not looked at.
      const float low = row.output_scale == 0 ? 0.0f : pair[0] * row.output_scale;
      const float high = row.output_scale == 0 ? 0.0f : pair[1] * row.output_scale;
      store_pair(out, stride, params.has_paired_out, column_of(n, 0), p.head_dim_v, low, high);
    }
  }

  const ForwardParams& params;
  const AttentionParams& p;
  typename Config::Shared& shared;
  const ForwardPlan& plan;
  const Sequence& seq;
  const QueryTile& tile;
  const int thread, warp_row;
  SoftmaxState<kM> state;
  Output acc_o;
};

template <typename Config>
FA_KERNEL(Config::kThreads, 1)
void flash_fwd_sm80(const __grid_constant__ ForwardParams params) {
  FlashForward<Config>(params, *static_cast<typename Config::Shared*>(ptx::shared_memory())).run();
}

}  // namespace fastattn::cuda
