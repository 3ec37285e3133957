// Gradients of one tile of keys on Hopper, and what it adds to dQ: the products of
// flash_bwd_dkdv_sm80.cuh by warpgroups, on tiles that TMA brings.
//
//   P^T = exp(K Q^T - lse);  dP^T = V dO^T;  dS^T = P^T * (dP^T - delta)
//   dV += P^T dO;  dK += dS^T Q;  dQ += dS K
//
// Scores are transposed, so that P^T and dS^T lie in registers as the left operands of dV and dK.
// dS goes to shared memory once, for dQ. Where an operand is wanted transposed, its descriptor says
// so: nothing is copied. A warp's part of dQ is 16 rows of 64 columns: it lays them in shared
// memory in the order of the sums, and one bulk copy adds them there, while the warp goes on.
#pragma once

#include "backward_scores.cuh"
#include "backward_sm90.h"
#include "dkdv_tile.cuh"
#include "dq_share.cuh"
#include "dq_turns.cuh"
#include "ring.cuh"
#include "wgmma_tile.cuh"

namespace fastattn::cuda {

template <typename TypeT, int kDim, BackwardTileSm90 kTile>
struct BackwardConfigSm90 {
  using T = TypeT;
  static constexpr int kHeadDim = kDim, kGroups = 2, kStages = 2;
  static constexpr int kThreads = ptx::kWarpgroupSize * (1 + kGroups);
  static constexpr int kConsumers = ptx::kWarpgroupSize * kGroups;
  static constexpr int kKeys = kBackwardKeysSm90, kQueries = kTile.queries;
  static constexpr int kPart = 64;  // queries whose scores are in registers at a time
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // dQ of a step is 64 x 64 a group: of 64 queries each has half of the columns, of 128 half of the
  // rows.
  static constexpr int kDqColumns = 64;
  static_assert(kQueries == 64 ? kHeadDim > 64 : kQueries == 128 && kHeadDim == 64);

  using KeyTile = PanelTile<T, kKeys, kHeadDim>;
  using QueryTile = PanelTile<T, kQueries, kHeadDim>;
  struct Shared {
    alignas(1024) KeyTile key;
    alignas(1024) KeyTile value;
    alignas(1024) QueryTile query[kStages];
    alignas(1024) QueryTile dout[kStages];
    alignas(1024) PanelTile<T, kKeys, kQueries> ds[2];    // transposed
    alignas(128) float dq[4 * kGroups][16 * kDqColumns];  // of each warp
    alignas(128) float row_lse[kStages][kQueries], delta[kStages][kQueries];
    Ring<kStages> query_ring, dout_ring;
    ptx::Barrier keys_full;  // K and V
    DkDvPlan plan;
    DqTurns turns;
    int64_t turn[4 * kGroups];  // of each warp, that it has not passed on yet; or kNone

    FA_DEVICE void init() {
      query_ring.init(4 * kGroups);
      dout_ring.init(4 * kGroups);
      ptx::mbarrier_init(&keys_full, 1);
      ptx::mbarrier_fence_init();
    }
  };
};

// The thread that loads.
template <typename Config>
class BackwardProducer {
  using Shared = typename Config::Shared;

 public:
  FA_DEVICE BackwardProducer(const BackwardParamsSm90& given, Shared& memory)
      : params(given), p(given.base.gradient.forward), shared(memory), plan(memory.plan) {}

  FA_DEVICE void run() {
    load_kv_tile();
    for (int n = 0; n < plan.steps(); ++n) load_q_tile(n);
  }

 private:
  FA_DEVICE void load_kv_tile() {
    const int row = static_cast<int>(plan.seq.first_k + plan.first_key);
    const int head = static_cast<int>(plan.head_kv);
    ptx::mbarrier_expect(&shared.keys_full, sizeof(shared.key) + sizeof(shared.value));
    load_panels(shared.key, &params.key_map, p.cu_seqlens_k, row, head, plan.seq,
                &shared.keys_full);
    load_panels(shared.value, &params.value_map, p.cu_seqlens_k, row, head, plan.seq,
                &shared.keys_full);
  }

  FA_DEVICE void load_q_tile(int n) {
    load_query_rows(n, shared.query, shared.query_ring, &params.query_map, shared.row_lse,
                    params.base.row_lse);
    load_query_rows(n, shared.dout, shared.dout_ring, &params.dout_map, shared.delta,
                    params.base.delta);
  }

  // A tile, and a number for each of its rows.
  template <typename Tile, typename Numbers, int kStages>
  FA_DEVICE void load_query_rows(int n, Tile (&tiles)[kStages], Ring<kStages>& ring,
                                 const TensorMap* map, Numbers (&numbers)[kStages],
                                 const float* of_rows) {
    const DkDvPlan::Step at = plan.step_of(n);
    const int64_t head = plan.first_head + at.head;
    const int64_t first = static_cast<int64_t>(at.block) * Config::kQueries;
    const int stage = n % kStages;
    ring.wait_empty(n);
    ptx::Barrier* barrier = ring.begin_fill(n, sizeof(Tile) + sizeof(Numbers));
    load_panels(tiles[stage], map, p.cu_seqlens_q, static_cast<int>(head),
                static_cast<int>(plan.seq.first_q + first), plan.seq, barrier);
    ptx::bulk_load(numbers[stage], of_rows + padded_origin(params.base, plan.seq, head) + first,
                   sizeof(Numbers), barrier);
  }

  const BackwardParamsSm90& params;
  const AttentionParams& p;
  Shared& shared;
  const DkDvPlan& plan;
};

// A warpgroup that computes: it has 64 keys.
template <typename Config>
class BackwardConsumer {
  using T = typename Config::T;
  using Shared = typename Config::Shared;
  static constexpr int kQueries = Config::kQueries, kStages = Config::kStages,
                       kPart = Config::kPart, kN = kPart / 8;
  static constexpr int kThreads = Config::kConsumers;
  static constexpr int64_t kNone = -1;
  using Scores = BackwardScores<true, false, 1, kN>;
  using Tile = Accumulator<1, kN>;
  using Gradient = Accumulator<1, kWholePanels<Config::kHeadDim> / 8>;
  using Operand = LeftOperand<T, 1, kN>;
  using PartOfDq = Accumulator<1, Config::kDqColumns / 8>;

 public:
  FA_DEVICE BackwardConsumer(const BackwardParamsSm90& given, Shared& memory)
      : params(given.base),
        p(given.base.gradient.forward),
        shared(memory),
        plan(memory.plan),
        warp(ptx::shuffle(thread() / ptx::kWarpSize, 0)) {}

  FA_DEVICE void run() {
    acc_dk.set_zero();
    acc_dv.set_zero();
    if (ptx::lane_id() == 0) ptx::store_shared(&shared.turn[warp], kNone);
    ptx::mbarrier_wait(&shared.keys_full, 0);
    const int steps = plan.steps();
#pragma unroll 1
    for (int n = 0; n < steps; ++n) {
      if (is_interior(plan.step_of(n).block)) {
        step<false>(n);
      } else {
        step<true>(n);
      }
    }
    if (ptx::lane_id() == 0) end_turn();
    const AttentionGradParams& g = params.gradient;
    store_key_rows<T>(acc_dk, plan, warp_row(), g.dkey, params.has_paired_dkey, p.head_dim,
                      params.scale);
    store_key_rows<T>(acc_dv, plan, warp_row(), g.dvalue, params.has_paired_dvalue, p.head_dim_v,
                      1.0f);
  }

 private:
  // Made whenever they are needed: registers are for the tiles.
  static FA_DEVICE int thread() {
    return static_cast<int>(threadIdx.x) - ptx::kWarpgroupSize;
  }
  FA_DEVICE int group() const {
    return warp / 4;
  }
  FA_DEVICE int warp_row() const {
    return 16 * warp;
  }

  FA_DEVICE bool is_interior(int block) const {
    return plan.first_interior <= block && block < plan.last_interior;
  }

  template <bool kMasked>
  FA_DEVICE void step(int n) {
    shared.query_ring.wait_full(n);
    shared.dout_ring.wait_full(n);
    bool may_leak = false;  // did Q or dO hold what must not reach keys that they do not see?
    if constexpr (kMasked) may_leak = stop_leaks(n % kStages);
#pragma unroll 1
    for (int first = 0; first < kQueries; first += kPart) {
      add_part<kMasked>(n, first, may_leak);
    }
  }

  // Queries `first` to first + kPart - 1 of the step, and after the last of them dQ.
  template <bool kMasked>
  FA_DEVICE void add_part(int n, int first, bool may_leak) {
    const int stage = n % kStages;
    const auto row_lse = [&](int, int c, int e) {
      return of_column(shared.row_lse[stage] + first, c, e);
    };
    const auto delta = [&](int, int c, int e) {
      return of_column(shared.delta[stage] + first, c, e);
    };
    const auto &query = shared.query[stage], &dout = shared.dout[stage];
    Scores scores;
    begin_multiply_rows<Config::kHeadDim>(scores.weights, shared.key, 64 * group(), query, first);
    Tile ds;
    begin_multiply_rows<Config::kHeadDim>(ds, shared.value, 64 * group(), dout, first);
    wait_for<1>(scores.weights);
    if constexpr (kMasked) scores.mask_tile(place_of(n, first));
    scores.template recompute_p<kMasked>(params.unit, row_lse);
    if (kMasked && may_leak) spread_nonfinite(scores.weights, delta);
    const Operand weights(scores.weights);
    ptx::wgmma_hold(scores.weights.x[0]);  // here, while dP is under way, and not behind the wait
    wait_for<0>(ds);
    begin_multiply_columns(acc_dv, weights, dout, first);
    scores.template to_ds<kMasked>(ds, params.survivor, delta);
    const Operand ds_operand(ds);
    store_operand(ds_operand, shared.ds[n % 2], warp_row(), first);
    ptx::fence_async_proxy();
    begin_multiply_columns(acc_dk, ds_operand, query, first);
    if (first + kPart < kQueries) {
      // The next part would wait for these soon enough; but with products under way where a loop
      // turns back, the compiler serialises all of them.
      wait_for<0>(acc_dk);
      ptx::wgmma_hold(acc_dv.x[0]);
    } else {
      add_dq(n, share_ds<kMasked>());
    }
  }

  // ---- dQ ---------------------------------------------------------------------------------------

  // The part of a group: rows of a panel of dS, columns of a panel of K.
  FA_DEVICE int dq_row_panel() const {
    return kQueries == 64 ? 0 : group();
  }
  FA_DEVICE int dq_column_panel() const {
    return kQueries == 64 ? group() : 0;
  }

  // Waits until dS of both groups is there. Whether K holds what must not reach rows of dQ that do
  // not see it.
  template <bool kMasked>
  FA_DEVICE bool share_ds() {
    if constexpr (kMasked) {
      return ptx::sync_named_or(kAllConsumers, kThreads,
                                share_is_nonfinite<kThreads>(shared.key, thread()));
    } else {
      ptx::sync_named(kAllConsumers, kThreads);
      return false;
    }
  }

  FA_DEVICE void add_dq(int n, bool key_leaks) {
    PartOfDq acc;
    const auto& ds = shared.ds[n % 2];
    const int row = 64 * dq_row_panel() + 16 * (warp % 4);
    if (key_leaks) {
      acc.set_zero();
      multiply_transposed<true>(acc, ds, row, shared.key, kPanelElements * dq_column_panel());
      release<0>(n);
    } else {
      begin_multiply_transposed(acc, ds, dq_row_panel(), shared.key, dq_column_panel());
      release<1>(n);
      wait_for<0>(acc);
    }
    const DkDvPlan::Step at = plan.step_of(n);
    const int64_t first = static_cast<int64_t>(at.block) * kQueries + row;
    const int64_t origin = padded_origin(params, plan.seq, plan.first_head + at.head);
    add_to_sums(acc, at.block, origin + first, plan.seq.len_q - first);
  }

  // Q and dO are used up when dK and dV are done, the newest products but kPending.
  template <int kPending>
  FA_DEVICE void release(int n) {
    wait_for<kPending>(acc_dv);
    ptx::wgmma_hold(acc_dk.x[0]);
    shared.dout_ring.release(n);
    shared.query_ring.release(n);
  }

  // Adds a warp's part to the sums: 16 rows from `row` on, of which `count` take part.
  FA_DEVICE void add_to_sums(const PartOfDq& acc, int block, int64_t row, int64_t count) {
    float* staged = shared.dq[warp];
    const int lane = ptx::lane_id();
    if (lane == 0) end_turn();
    ptx::sync_warp();  // what it held has been added
#pragma unroll
    for (int n = 0; n < PartOfDq::kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        ptx::store_shared(staged + 128 * n + 32 * e + lane, acc.x[0][n][e]);
      }
    }
    ptx::fence_async_proxy();
    ptx::sync_warp();
    const int column = kPanelElements * dq_column_panel();
    const int columns = min_of(Config::kDqColumns, Config::kHeadDim - column);
    // Rows of which none takes part may be another sequence's.
    if (lane == 0 && count > 0) {
      begin_turn(block, row);
      ptx::bulk_add(dq_fragment<Config::kHeadDim>(params.dquery_sums, row, column), staged,
                    columns / 8 * 128 * static_cast<int>(sizeof(float)));
      ptx::bulk_commit();
    }
  }

  // One lane of a warp has the turns. It passes one on a step late, when the sums are long there.
  FA_DEVICE void begin_turn(int block, int64_t row) {
    if (params.dquery_turns == nullptr) return;
    const int64_t turn = dq_turn<Config::kHeadDim>(row, dq_column_panel());
    shared.turns.await(params.dquery_turns + turn, block);
    ptx::store_shared(&shared.turn[warp], turn);
  }

  // What the warp has laid down has been added, or, where the order is free, will be.
  FA_DEVICE void end_turn() {
    if (params.dquery_turns == nullptr) {
      ptx::bulk_wait_read<0>();
      return;
    }
    ptx::bulk_wait<0>();
    const int64_t turn = ptx::load_shared(&shared.turn[warp]);
    if (turn != kNone) shared.turns.pass_on(params.dquery_turns + turn);
    ptx::store_shared(&shared.turn[warp], kNone);
  }

  // ---- What must not reach those who do not see it ----------------------------------------------

  enum { kAllConsumers = 1 };  // named barriers

  // Infinities and NaN of Q and dO become 0: who saw them has them in the query's lse, or delta.
  FA_DEVICE bool stop_leaks(int stage) {
    auto &query = shared.query[stage], &dout = shared.dout[stage];
    const bool found = ptx::sync_named_or(kAllConsumers, kThreads,
                                          share_is_nonfinite<kThreads>(query, thread()) ||
                                              share_is_nonfinite<kThreads>(dout, thread()));
    if (found) {
      clear_nonfinite<kThreads>(query, thread());
      clear_nonfinite<kThreads>(dout, thread());
      ptx::fence_async_proxy();
      ptx::sync_named(kAllConsumers, kThreads);
    }
    return found;
  }

  FA_DEVICE ScorePlace<true> place_of(int n, int first) const {
    const DkDvPlan::Step at = plan.step_of(n);
    return {params,
            p,
            plan.seq,
            plan.first_head + at.head,
            plan.first_key + warp_row(),
            static_cast<int64_t>(at.block) * kQueries + first};
  }

  const BackwardParams& params;
  const AttentionParams& p;
  Shared& shared;
  const DkDvPlan& plan;
  const int warp;  // of those that compute; from one lane, so that the compiler knows it is uniform
  Gradient acc_dk, acc_dv;
};

template <typename Config>
FA_KERNEL(Config::kThreads, 1)
void flash_bwd_sm90(const __grid_constant__ BackwardParamsSm90 params) {
  auto& shared = *static_cast<typename Config::Shared*>(ptx::shared_memory_1024());
  if (threadIdx.x == 0) {
    shared.init();
    shared.plan =
        DkDvPlan(params.base, key_tile_of_block(params.base), Config::kKeys, Config::kQueries);
    shared.turns = DqTurns(params.base, shared.plan, Config::kKeys, Config::kQueries);
  }
  ptx::sync_block();
  if (shared.plan.first_key >= shared.plan.seq.rows_k) return;
  if (threadIdx.x < ptx::kWarpgroupSize) {
    ptx::fewer_registers<Config::kProducerRegisters>();
    if (threadIdx.x == 0) BackwardProducer<Config>(params, shared).run();
  } else {
    ptx::more_registers<Config::kConsumerRegisters>();
    BackwardConsumer<Config>(params, shared).run();
  }
}

}  // namespace fastattn::cuda
