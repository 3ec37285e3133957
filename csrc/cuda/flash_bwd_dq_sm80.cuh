// Gradient of one tile of queries: the block goes through the keys that they see, in their order.
//
//   P = exp(Q K^T - lse);  dP = dO V^T;  dS = P * (dP - delta);  dQ += dS K
#pragma once

#include "backward_scores.cuh"

namespace fastattn::cuda {

// Which part of the problem a block has, in shared memory.
struct DqPlan {
  Sequence seq;
  int64_t head, head_kv, first_query;
  int first_block, last_block;        // tiles of keys that some row sees
  int first_interior, last_interior;  // of these, those that every row sees the whole of

  FA_DEVICE DqPlan(const BackwardParams& params, int queries, int keys) {
    const AttentionParams& p = params.gradient.forward;
    // The last tiles first: under a causal mask they see the most keys.
    const int nth = params.tiles - 1 - static_cast<int>(blockIdx.x % params.tiles);
    // Divisions are of 32 bits: those of 64 are calls.
    const uint32_t index = blockIdx.x / params.tiles, heads = static_cast<uint32_t>(p.heads_q);
    head = index % heads;
    head_kv = index % heads / (heads / static_cast<uint32_t>(p.heads_kv));
    seq = sequence_at(p, index / heads);
    first_query = static_cast<int64_t>(nth) * queries;
    first_block = last_block = first_interior = last_interior = 0;
    const Range rows = {first_query, min_of(first_query + queries, seq.len_q)};
    if (is_empty(rows)) return;
    const Range any = keys_seen_by_any(p, seq, rows), all = keys_seen_by_all(p, seq, rows);
    if (is_empty(any)) return;
    first_block = static_cast<int>(any.first / keys);
    last_block = static_cast<int>(ceil_div(any.last, keys));
    first_interior = static_cast<int>(ceil_div(max_of<int64_t>(all.first, 0), keys));
    last_interior = static_cast<int>(max_of<int64_t>(all.last, 0) / keys);
  }
};

template <typename TypeT, int kDim, DqTile kTile, bool kWithTerms>
struct DqConfig {
  using T = TypeT;
  static constexpr int kHeadDim = kDim, kThreads = 32 * kTile.warps, kM = kTile.row_tiles;
  static constexpr int kQueries = kTile.queries(), kKeys = kTile.keys, kStages = kTile.stages;
  static constexpr bool kTerms = kWithTerms;

  // A tile of keys.
  struct Stage {
    SharedTile<T, kKeys, kHeadDim> key, value;
  };
  struct Shared {
    DqPlan plan;
    SharedTile<T, kQueries, kHeadDim> query, dout;
    alignas(16) float row_lse[kQueries], delta[kQueries];
    Stage stages[kStages];
  };
};

template <typename Config>
class FlashDq {
  using T = typename Config::T;
  using Stage = typename Config::Stage;
  static constexpr int kM = Config::kM, kThreads = Config::kThreads, kStages = Config::kStages;
  static constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys, kN = kKeys / 8;
  using Scores = BackwardScores<false, Config::kTerms, kM, kN>;
  using Gradient = Accumulator<kM, Config::kHeadDim / 8>;

 public:
  FA_DEVICE FlashDq(const BackwardParams& given, typename Config::Shared& memory)
      : params(given),
        g(given.gradient),
        p(given.gradient.forward),
        shared(memory),
        plan(memory.plan),
        seq(plan.seq),
        thread(static_cast<int>(threadIdx.x)),
        warp_row(thread / 32 * 16 * kM) {}

  FA_DEVICE void run() {
    if (thread == 0) shared.plan = DqPlan(params, kQueries, kKeys);
    ptx::sync_block();
    if (plan.first_query >= seq.rows_q) return;
    acc_dq.set_zero();
    if (plan.first_block < plan.last_block) {
      load_q_tile();
      load_kv_tile(plan.first_block, 0);
      int stage = 0;
      for (int block = plan.first_block; block < plan.last_block; ++block) {
        if (is_interior(block)) {
          step<false>(block, stage);
        } else {
          step<true>(block, stage);
        }
        stage = kStages - 1 - stage;
      }
    }
    store();
  }

 private:
  FA_DEVICE bool is_interior(int block) const {
    return !Config::kTerms && plan.first_interior <= block && block < plan.last_interior;
  }

  template <bool kMasked>
  FA_DEVICE void step(int block, int stage_index) {
    Stage& stage = shared.stages[stage_index];
    ptx::cp_async_wait<0>();
    bool may_leak = false;  // does K hold what must not reach the rows that do not see it?
    if constexpr (kMasked) {
      may_leak = ptx::sync_block_or(share_is_nonfinite<kThreads>(stage.key, thread));
    } else {
      ptx::sync_block();
    }
    // This step is there, and the one before is used up.
    const bool has_next = block + 1 < plan.last_block;
    if (kStages > 1 && has_next) load_kv_tile(block + 1, kStages - 1 - stage_index);
    add_tile<kMasked>(block, stage, may_leak);
    if (kStages == 1) {
      ptx::sync_block();
      if (has_next) load_kv_tile(block + 1, 0);
    }
  }

  template <bool kMasked>
  FA_DEVICE void add_tile(int block, Stage& stage, bool may_leak) {
    const ScorePlace<false> place = {
        params, p, seq, plan.head, plan.first_query + warp_row, first_key(block)};
    const auto row_lse = [&](int m, int, int e) { return of_row(shared.row_lse, m, e); };
    const auto delta = [&](int m, int, int e) { return of_row(shared.delta, m, e); };
    Scores scores;
    scores.weights.set_zero();
    multiply_rows(scores.weights, shared.query, warp_row, stage.key, 0);
    if constexpr (kMasked) scores.mask_tile(place);
    scores.template recompute_p<kMasked>(params.unit, row_lse);
    if constexpr (Config::kTerms) scores.drop(place);
    scores.through_softcap();
    Accumulator<kM, kN> ds;
    ds.set_zero();
    multiply_rows(ds, shared.dout, warp_row, stage.value, 0);
    scores.template to_ds<kMasked>(ds, params.survivor, delta);
    if (kMasked && may_leak) {
      ptx::sync_block();  // the products above have seen K
      clear_nonfinite<kThreads>(stage.key, thread);
      ptx::sync_block();
    }
    multiply_columns<false>(acc_dq, LeftOperand<T, kM, kN>(ds), stage.key);
  }

  FA_DEVICE float of_row(const float* of_rows, int m, int e) const {
    return ptx::load_shared(of_rows + warp_row + row_of(m, e));
  }

  FA_DEVICE int64_t first_key(int block) const {
    return static_cast<int64_t>(block) * kKeys;
  }

  // Waited for together with the first tile of keys.
  FA_DEVICE void load_q_tile() {
    const QueryTile tile = {plan.head, plan.first_query, 1};
    load_tile<kThreads>(shared.query, thread, params.query,
                        QueryTileRows<T>(p.query, seq, tile, seq.len_q));
    load_tile<kThreads>(shared.dout, thread, params.dout,
                        QueryTileRows<T>(g.dout, seq, tile, seq.len_q));
    const int64_t origin = padded_origin(params, seq, plan.head) + plan.first_query;
    load_of_rows(shared.row_lse, params.row_lse + origin);
    load_of_rows(shared.delta, params.delta + origin);
  }

  // A number for each query of the tile.
  FA_DEVICE void load_of_rows(float (&to)[kQueries], const float* from) {
    if (thread < kQueries / 4) ptx::cp_async_16(to + 4 * thread, from + 4 * thread, 16);
  }

  FA_DEVICE void load_kv_tile(int block, int stage_index) {
    load_key_rows(shared.stages[stage_index].key, p.key, params.key, block);
    load_key_rows(shared.stages[stage_index].value, p.value, params.value, block);
    ptx::cp_async_commit();
  }
  FA_DEVICE void load_key_rows(SharedTile<T, kKeys, Config::kHeadDim>& to,
                               const ConstTensor& tensor, const ColumnLayout& layout, int block) {
    const KeyRows<T> rows(p, tensor, seq, plan.head_kv);
    load_tile<kThreads>(to, thread, layout,
                        KeyTileRows<T>{rows, first_key(block), {seq.first_seen, seq.len_k}});
  }

  FA_DEVICE void store() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = plan.first_query + warp_row + row_of(m, 2 * half);
        if (i >= seq.rows_q) continue;
        const bool takes_part = i < seq.len_q;  // else what the row has gathered means nothing
        T* row = static_cast<T*>(g.dquery.data) + row_offset(g.dquery, seq, plan.head, i);
#pragma unroll
        for (int n = 0; n < Gradient::kN; ++n) {
          const float* pair = &acc_dq.x[m][n][2 * half];
          store_pair(row, g.dquery.stride[4], params.has_paired_dquery, column_of(n, 0), p.head_dim,
                     takes_part ? pair[0] * params.scale : 0.0f,
                     takes_part ? pair[1] * params.scale : 0.0f);
        }
      }
    }
  }

  const BackwardParams& params;
  const AttentionGradParams& g;
  const AttentionParams& p;
  typename Config::Shared& shared;
  const DqPlan& plan;
  const Sequence& seq;
  const int thread, warp_row;
  Gradient acc_dq;
};

template <typename Config>
FA_KERNEL(Config::kThreads, 1)
void flash_bwd_dq_sm80(const __grid_constant__ BackwardParams params) {
  FlashDq<Config>(params, *static_cast<typename Config::Shared*>(ptx::shared_memory())).run();
}

}  // namespace fastattn::cuda
