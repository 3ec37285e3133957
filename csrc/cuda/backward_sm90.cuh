// What the backward kernels of Hopper have in common: the thread that loads, sums of dQ, and what
// is kept from rows that do not see it.
#pragma once

#include "backward_scores.cuh"
#include "backward_sm90.h"
#include "dkdv_tile.cuh"
#include "dq_share.cuh"
#include "dq_turns.cuh"
#include "ring.cuh"
#include "wgmma_tile.cuh"

namespace fastattn::cuda {

// dQ leaves in parts of a warp: 16 rows of a panel.
using DqPart = float[16 * kPanelElements];

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

// A warpgroup that computes.
template <typename Config>
class BackwardConsumer {
 protected:
  using T = typename Config::T;
  using Shared = typename Config::Shared;
  using PartOfDq = Accumulator<1, kPanelElements / 8>;
  static constexpr int kQueries = Config::kQueries, kThreads = Config::kConsumers;

  FA_DEVICE BackwardConsumer(const BackwardParamsSm90& given, Shared& memory)
      : params(given.base),
        p(given.base.gradient.forward),
        shared(memory),
        plan(memory.plan),
        warp(ptx::shuffle(thread() / ptx::kWarpSize, 0)) {
    if (ptx::lane_id() == 0) ptx::store_shared(&shared.turn[warp], kNone);
  }

  // Made whenever they are needed: registers are for the tiles.
  static FA_DEVICE int thread() {
    return static_cast<int>(threadIdx.x) - ptx::kWarpgroupSize;
  }
  FA_DEVICE int group() const {
    return warp / 4;
  }

  // Whether a tile of queries needs no mask.
  FA_DEVICE bool is_interior(int block) const {
    return plan.first_interior <= block && block < plan.last_interior;
  }

  // Of queries `first` on of a step, and of keys `row` on of the tile.
  FA_DEVICE ScorePlace<true> place_of(int n, int first, int row) const {
    const DkDvPlan::Step at = plan.step_of(n);
    return {params,
            p,
            plan.seq,
            plan.first_head + at.head,
            plan.first_key + row,
            static_cast<int64_t>(at.block) * kQueries + first};
  }

  // ---- dQ ---------------------------------------------------------------------------------------

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

  // Where 16 rows of dQ lie in the sums, and how many of them take part.
  struct DqRows {
    int block;
    int64_t first, count;
  };
  FA_DEVICE DqRows dq_rows(int n, int row) const {
    const DkDvPlan::Step at = plan.step_of(n);
    const int64_t first = static_cast<int64_t>(at.block) * kQueries + row;
    return {at.block, padded_origin(params, plan.seq, plan.first_head + at.head) + first,
            plan.seq.len_q - first};
  }

  // Each of the warps that share these rows has a turn. One of its lanes waits for it, and passes
  // it on a step late, when the sums are long there.
  FA_DEVICE void begin_turn(const DqRows& rows, int share) {
    if (params.dquery_turns == nullptr || ptx::lane_id() != 0) return;
    end_turn();
    if (rows.count <= 0) return;
    const int64_t turn = dq_turn(rows.first, share);
    shared.turns.await(params.dquery_turns + turn, rows.block);
    ptx::store_shared(&shared.turn[warp], turn);
  }

  // By that lane: what the warp has laid down has been added.
  FA_DEVICE void end_turn() {
    ptx::bulk_wait<0>();
    const int64_t turn = ptx::load_shared(&shared.turn[warp]);
    if (turn != kNone) shared.turns.pass_on(params.dquery_turns + turn);
    ptx::store_shared(&shared.turn[warp], kNone);
  }

  // Adds a warp's part to the sums.
  FA_DEVICE void add_to_sums(const PartOfDq& acc, const DqRows& rows, int panel) {
    float* staged = shared.dq[warp];
    const int lane = ptx::lane_id();
    if (lane == 0) ptx::bulk_wait_read<0>();
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
    const int column = kPanelElements * panel;
    const int columns = min_of(kPanelElements, Config::kHeadDim - column);
    // Rows of which none takes part may be another sequence's.
    if (lane == 0 && rows.count > 0) {
      ptx::bulk_add(dq_fragment<Config::kSumsHeadDim>(params.dquery_sums, rows.first, column),
                    staged, columns / 8 * 128 * static_cast<int>(sizeof(float)));
      ptx::bulk_commit();
    }
  }

  // ---- What must not reach those who do not see it ----------------------------------------------

  enum { kAllConsumers = 1, kWeights = 2 };  // named barriers

  // Infinities and NaN of Q and dO become 0: who saw them has them in the query's lse, or delta.
  template <typename QueryTile, typename DoutTile>
  FA_DEVICE bool stop_leaks(QueryTile& query, DoutTile& dout) {
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

  static constexpr int64_t kNone = -1;
  const BackwardParams& params;
  const AttentionParams& p;
  Shared& shared;
  const DkDvPlan& plan;
  const int warp;  // of those that compute; from one lane, so that the compiler knows it is uniform
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
    Config::consume(params, shared);
  }
}

}  // namespace fastattn::cuda
