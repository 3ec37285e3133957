// Gradients of one tile of keys and their values (Dao, 2023, "FlashAttention-2"): the block goes
// through the queries that see them, of every head of the group, in a fixed order. Scores are
// transposed, so that what has been made of them lies in registers as the next product needs it:
//
//   P^T = exp(K Q^T - lse);  dP^T = V dO^T;  dS^T = P^T * (dP^T - delta)
//   dV += P^T dO;  dK += dS^T Q
//
// Where equal calls need not give equal bits, it adds its share to dQ too: 5 products instead of 7.
#pragma once

#include "backward_scores.cuh"
#include "dkdv_tile.cuh"
#include "dq_share.cuh"

namespace fastattn::cuda {

// Which gradients a kernel computes: where dK and dV do not fit the registers, one at a time; dQ
// together with dK.
struct Gradients {
  bool dk, dv, dq;
};

template <typename TypeT, int kDim, DkDvTile kTile, bool kWithTerms, Gradients kWanted>
struct DkDvConfig {
  using T = TypeT;
  static constexpr int kHeadDim = kDim, kThreads = 32 * kTile.warps, kM = kTile.row_tiles;
  static constexpr int kKeys = kTile.keys(), kQueries = kTile.queries, kPart = kTile.part,
                       kStages = kTile.stages;
  static constexpr bool kTerms = kWithTerms, kDk = kWanted.dk, kDv = kWanted.dv;
  static constexpr bool kDq = kWanted.dq;

  // A tile of queries.
  struct Stage {
    SharedTile<T, kQueries, kHeadDim> query, dout;
    alignas(16) float row_lse[kQueries], delta[kQueries];
  };
  struct None {};
  struct Shared {
    DkDvPlan plan;
    SharedTile<T, kKeys, kHeadDim> key;
    std::conditional_t<kDk, SharedTile<T, kKeys, kHeadDim>, None> value;
    Stage stages[kStages];
    std::conditional_t<kDq, SharedTile<T, kKeys, kPart>, None> ds[kQueries / kPart];  // transposed
  };
};

template <typename Config>
class FlashDkDv {
  using T = typename Config::T;
  using Stage = typename Config::Stage;
  static constexpr int kM = Config::kM, kThreads = Config::kThreads, kStages = Config::kStages;
  static constexpr int kKeys = Config::kKeys, kQueries = Config::kQueries;
  static constexpr int kPart = Config::kPart, kN = kPart / 8;
  using Scores = BackwardScores<true, Config::kTerms, kM, kN>;
  using Tile = Accumulator<kM, kN>;
  using Gradient = Accumulator<kM, Config::kHeadDim / 8>;
  using Operand = LeftOperand<T, kM, kN>;

 public:
  FA_DEVICE FlashDkDv(const BackwardParams& given, typename Config::Shared& memory)
      : params(given),
        g(given.gradient),
        p(given.gradient.forward),
        shared(memory),
        plan(memory.plan),
        seq(plan.seq),
        thread(static_cast<int>(threadIdx.x)) {}

  FA_DEVICE void run() {
    if (thread == 0) shared.plan = DkDvPlan(params, blockIdx.x, kKeys, kQueries);
    ptx::sync_block();
    if (plan.first_key >= seq.rows_k) return;
    if constexpr (Config::kDk) acc_dk.set_zero();
    if constexpr (Config::kDv) acc_dv.set_zero();
    if (plan.steps() > 0) {
      load_kv_tile();
      load_q_tile(0);
      for (int n = 0; n < plan.steps(); ++n) {
        if (is_interior(plan.step_of(n).block)) {
          step<false>(n);
        } else {
          step<true>(n);
        }
      }
    }
    store();
  }

 private:
  FA_DEVICE int warp_row() const {
    return static_cast<int>(threadIdx.x) / 32 * 16 * kM;
  }
  FA_DEVICE bool is_interior(int block) const {
    return !Config::kTerms && plan.first_interior <= block && block < plan.last_interior;
  }

  template <bool kMasked>
  FA_DEVICE void step(int n) {
    Stage& stage = shared.stages[n % kStages];
    ptx::cp_async_wait<0>();
    bool may_leak = false;  // is there what must not reach those who do not see it?
    if constexpr (kMasked) {
      may_leak = ptx::sync_block_or(holds_nonfinite(stage));
      if (may_leak) make_finite(stage);
    } else {
      ptx::sync_block();
    }
    // This step is there, and the one before is used up.
    if (kStages > 1 && n + 1 < plan.steps()) load_q_tile(n + 1);
#pragma unroll 1
    for (int first = 0; first < kQueries; first += kPart) {
      add_part<kMasked>(n, stage, first, may_leak);
    }
    if constexpr (Config::kDq) add_dq<kMasked>(n, may_leak);
    if (kStages == 1) {
      ptx::sync_block();
      if (n + 1 < plan.steps()) load_q_tile(n + 1);
    }
  }

  // Whether what this thread has loaded of Q, dO, or K for dQ, holds infinity or NaN.
  FA_DEVICE bool holds_nonfinite(const Stage& stage) const {
    bool found = share_is_nonfinite<kThreads>(stage.query, thread) ||
                 share_is_nonfinite<kThreads>(stage.dout, thread);
    if constexpr (Config::kDq) found = found || share_is_nonfinite<kThreads>(shared.key, thread);
    return found;
  }

  // Who saw the NaN of a query has it in the query's lse, or delta.
  FA_DEVICE void make_finite(Stage& stage) {
    clear_nonfinite<kThreads>(stage.query, thread);
    clear_nonfinite<kThreads>(stage.dout, thread);
    ptx::sync_block();
  }

  // Queries `first` to first + kPart of the step: as many as the registers hold scores of.
  template <bool kMasked>
  FA_DEVICE void add_part(int n, const Stage& stage, int first, bool may_leak) {
    const auto row_lse = [&](int, int c, int e) { return of_column(stage.row_lse + first, c, e); };
    const auto delta = [&](int, int c, int e) { return of_column(stage.delta + first, c, e); };
    Scores scores;
    scores.weights.set_zero();
    multiply_rows(scores.weights, shared.key, warp_row(), stage.query, first);
    if constexpr (kMasked) scores.mask_tile(place_of(n, first));
    scores.template recompute_p<kMasked>(params.unit, row_lse);
    if constexpr (Config::kTerms) scores.drop(place_of(n, first));
    if constexpr (Config::kDv) {
      Tile kept = scores.survivors(params.survivor);
      if (kMasked && may_leak) spread_nonfinite(kept, delta);
      multiply_columns<false>(acc_dv, Operand(kept), stage.dout, first);
    }
    if constexpr (Config::kDk) {
      scores.through_softcap();
      Tile ds;
      ds.set_zero();
      multiply_rows(ds, shared.value, warp_row(), stage.dout, first);
      scores.template to_ds<kMasked>(ds, params.survivor, delta);
      if constexpr (Config::kDq) store_accumulator(ds, shared.ds[first / kPart], warp_row());
      multiply_columns<false>(acc_dk, Operand(ds), stage.query, first);
    }
  }

  FA_DEVICE ScorePlace<true> place_of(int n, int first) const {
    const DkDvPlan::Step at = plan.step_of(n);
    return {params,
            p,
            seq,
            plan.first_head + at.head,
            plan.first_key + warp_row(),
            first_query(at) + first};
  }

  template <bool kMasked>
  FA_DEVICE void add_dq(int n, bool may_leak) {
    using Share = DqShare<Config::kHeadDim, kThreads / 32, kQueries>;
    const Share share(thread / 32);
    Accumulator<Share::kM, Share::kColumns / 8> acc;
    acc.set_zero();
    const auto& ds = shared.ds[share.row / kPart];
    ptx::sync_block();  // dS of all warps is there
    if (kMasked && may_leak) {
      multiply_transposed<true>(acc, ds, share.row % kPart, shared.key, share.column);
    } else {
      multiply_transposed<false>(acc, ds, share.row % kPart, shared.key, share.column);
    }
    const DkDvPlan::Step at = plan.step_of(n);
    const int64_t first = first_query(at) + share.row;
    const int64_t origin = padded_origin(params, seq, plan.first_head + at.head);
    add_to_sums<Config::kHeadDim>(params.dquery_sums, origin + first, seq.len_q - first,
                                  share.column, acc);
  }

  FA_DEVICE int64_t first_query(DkDvPlan::Step at) const {
    return static_cast<int64_t>(at.block) * kQueries;
  }

  // Waited for together with the first tile of queries.
  FA_DEVICE void load_kv_tile() {
    load_key_rows(shared.key, p.key, params.key);
    if constexpr (Config::kDk) load_key_rows(shared.value, p.value, params.value);
  }
  FA_DEVICE void load_key_rows(SharedTile<T, kKeys, Config::kHeadDim>& to,
                               const ConstTensor& tensor, const ColumnLayout& layout) {
    const KeyRows<T> rows(p, tensor, seq, plan.head_kv);
    load_tile<kThreads>(to, thread, layout,
                        KeyTileRows<T>{rows, plan.first_key, {seq.first_seen, seq.len_k}});
  }

  FA_DEVICE void load_q_tile(int n) {
    Stage& stage = shared.stages[n % kStages];
    const DkDvPlan::Step at = plan.step_of(n);
    const QueryTile tile = {plan.first_head + at.head, first_query(at), 1};
    load_tile<kThreads>(stage.query, thread, params.query,
                        QueryTileRows<T>(p.query, seq, tile, seq.len_q));
    load_tile<kThreads>(stage.dout, thread, params.dout,
                        QueryTileRows<T>(g.dout, seq, tile, seq.len_q));
    const int64_t origin = padded_origin(params, seq, tile.first_head) + tile.first;
    load_of_rows(stage.row_lse, params.row_lse + origin);
    load_of_rows(stage.delta, params.delta + origin);
    ptx::cp_async_commit();
  }

  // A number for each query of a tile.
  FA_DEVICE void load_of_rows(float (&to)[kQueries], const float* from) {
    if (thread < kQueries / 4) ptx::cp_async_16(to + 4 * thread, from + 4 * thread, 16);
  }

  FA_DEVICE void store() {
    if constexpr (Config::kDk) {
      store_key_rows<T>(acc_dk, plan, warp_row(), g.dkey, params.has_paired_dkey, p.head_dim,
                        params.scale);
    }
    if constexpr (Config::kDv) {
      store_key_rows<T>(acc_dv, plan, warp_row(), g.dvalue, params.has_paired_dvalue, p.head_dim_v,
                        1.0f);
    }
  }

  const BackwardParams& params;
  const AttentionGradParams& g;
  const AttentionParams& p;
  typename Config::Shared& shared;
  const DkDvPlan& plan;
  const Sequence& seq;
  const int thread;
  Gradient acc_dk, acc_dv;
};

template <typename Config>
FA_KERNEL(Config::kThreads, 1)
void flash_bwd_dkdv_sm80(const __grid_constant__ BackwardParams params) {
  FlashDkDv<Config>(params, *static_cast<typename Config::Shared*>(ptx::shared_memory())).run();
}

}  // namespace fastattn::cuda
