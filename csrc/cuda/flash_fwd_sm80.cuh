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

#include "forward_tile.cuh"

namespace fastattn::cuda {

// C: what keys and values are stored as, T or int8_t. kTerms: scores need ScoreTerms, or dropout.
template <typename TypeT, typename TypeC, int kDim, int kNumWarps, int kRowTiles, int kNumKeys,
          bool kWithTerms>
struct ForwardConfig {
  using T = TypeT;
  using C = TypeC;
  static constexpr int kHeadDim = kDim, kWarps = kNumWarps, kThreads = 32 * kNumWarps;
  static constexpr int kM = kRowTiles, kQueries = 16 * kRowTiles * kNumWarps, kKeys = kNumKeys;
  static constexpr bool kTerms = kWithTerms, kInt8 = sizeof(C) == 1;
  static constexpr Maximum kMaximum = kTerms ? Maximum::kScore : Maximum::kExponent;

  struct Shared {
    ForwardPlan plan;
    KeyRows<C> key_rows, value_rows;
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
    if (thread == 0) set_plan();
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
  FA_DEVICE void set_plan() {
    shared.plan = ForwardPlan(params, blockIdx.x, Config::kQueries, kKeys);
    shared.key_rows = KeyRows<C>(p, p.key, seq, plan.head_kv);
    shared.value_rows = KeyRows<C>(p, p.value, seq, plan.head_kv);
  }

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
    if constexpr (Config::kTerms) drop_weights(scores, p, plan, warp_row, origin_of(block));
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

  // Part of the group of the first tile of keys.
  FA_DEVICE void load_q_tile() {
    load_tile<kThreads>(shared.query, thread, params.query,
                        QueryTileRows<T>(p.query, seq, tile, seq.len_q));
  }

  FA_DEVICE void load_k_tile(int block) {
    load_kv_tile(shared.key, shared.key_rows, params.key, block);
    if constexpr (Config::kInt8) load_scales(shared.key_scale, p.cache.key_scale, block);
  }
  FA_DEVICE void load_v_tile(int block) {
    load_kv_tile(shared.value, shared.value_rows, params.value, block);
    if constexpr (Config::kInt8) load_scales(shared.value_scale, p.cache.value_scale, block);
  }

  template <typename Tile>
  FA_DEVICE void load_kv_tile(Tile& to, const KeyRows<C>& rows, const ColumnLayout& layout,
                              int block) {
    load_tile<kThreads>(to, thread, layout, rows_of(rows, block));
    ptx::cp_async_commit();
  }

  FA_DEVICE void load_scales(float* scales, const ConstTensor& tensor, int block) {
    if (thread >= kKeys) return;
    const KeyRows<float> rows(p, tensor, seq, plan.head_kv);
    const float* at = rows_of(rows, block)(thread);
    ptx::store_shared(scales + thread, at == nullptr ? 0.0f : *at);
  }

  // Of the keys of a tile, those that may be looked at.
  template <typename Data>
  FA_DEVICE KeyTileRows<Data> rows_of(const KeyRows<Data>& rows, int block) const {
    return {rows, origin_of(block), {seq.first_seen, seq.len_k}};
  }

  FA_DEVICE int64_t origin_of(int block) const {
    return static_cast<int64_t>(block) * kKeys;
  }

  FA_DEVICE void mask_tile(Scores& scores, int block) const {
    const int64_t j0 = origin_of(block);
    if constexpr (Config::kTerms) add_terms(scores, p, plan, warp_row, j0);
    hide_keys(scores, p, plan, warp_row, j0);
  }

  FA_DEVICE void store() {
    finalize(acc_o, state, params, plan, warp_row);
    if (params.splits > 1) {
      store_part(acc_o, params, plan, warp_row);
    } else {
      store_out();
    }
  }

  // By way of shared memory, where the warp's queries were (a barrier lies behind their last use):
  // whole chunks leave.
  FA_DEVICE void store_out() {
    using Tile = decltype(shared.query);
    constexpr int kChunks = 16 * kM * Tile::kRowChunks;
    store_accumulator(acc_o, shared.query, warp_row);
    ptx::sync_warp();
#pragma unroll 1
    for (int n = ptx::lane_id(); n < kChunks; n += ptx::kWarpSize) {
      const int r = warp_row + n / Tile::kRowChunks, index = n % Tile::kRowChunks;
      const int64_t i = tile.query(r);
      if (i >= seq.rows_q) continue;
      const Chunk* chunk = reinterpret_cast<const Chunk*>(shared.query.chunk(r, index));
      store_chunk(row_of_result<T>(p.out, seq, tile.head(r), i), params.out,
                  index * Tile::kChunkColumns, ptx::load_shared(chunk));
    }
  }

  const ForwardParams& params;
  const AttentionParams& p;
  typename Config::Shared& shared;
  const ForwardPlan& plan;
  const Sequence& seq;
  const QueryTile& tile;
  const int thread, warp_row;
  SoftmaxState<kM, Config::kMaximum> state;
  Output acc_o;
};

template <typename Config>
FA_KERNEL(Config::kThreads, 1)
void flash_fwd_sm80(const __grid_constant__ ForwardParams params) {
  FlashForward<Config>(params, *static_cast<typename Config::Shared*>(ptx::shared_memory())).run();
}

}  // namespace fastattn::cuda
