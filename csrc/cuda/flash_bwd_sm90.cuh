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

#include "backward_sm90.cuh"

namespace fastattn::cuda {

template <typename TypeT, int kDim, BackwardTileSm90 kTile>
struct BackwardConfigSm90 {
  using T = TypeT;
  static constexpr int kHeadDim = kDim, kSumsHeadDim = kDim, kGroups = 2, kStages = 2;
  static constexpr int kThreads = ptx::kWarpgroupSize * (1 + kGroups);
  static constexpr int kConsumers = ptx::kWarpgroupSize * kGroups;
  static constexpr int kKeys = kTile.keys, kQueries = kTile.queries;
  static constexpr int kPart = 64;  // queries whose scores are in registers at a time
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // dQ of a step is 64 x 64 a group: of 64 queries each has half of the columns, of 128 half of the
  // rows.
  static_assert(kKeys == 128 &&
                (kQueries == 64 ? kHeadDim > 64 : kQueries == 128 && kHeadDim == 64));

  using KeyTile = PanelTile<T, kKeys, kHeadDim>;
  using QueryTile = PanelTile<T, kQueries, kHeadDim>;
  struct Shared {
    alignas(1024) KeyTile key;
    alignas(1024) KeyTile value;
    alignas(1024) QueryTile query[kStages];
    alignas(1024) QueryTile dout[kStages];
    alignas(1024) PanelTile<T, kKeys, kQueries> ds[2];  // transposed
    alignas(128) DqPart dq[4 * kGroups];                // of each warp
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

  static FA_DEVICE void consume(const BackwardParamsSm90& params, Shared& shared);
};

// It has 64 keys.
template <typename Config>
class BackwardKeys : BackwardConsumer<Config> {
  using Base = BackwardConsumer<Config>;
  using Base::kQueries, Base::group;
  using Base::params, Base::p, Base::shared, Base::plan, Base::warp;
  using typename Base::Shared, typename Base::T, typename Base::PartOfDq;
  static constexpr int kStages = Config::kStages, kPart = Config::kPart, kN = kPart / 8;
  using Scores = BackwardScores<true, false, 1, kN>;
  using Tile = Accumulator<1, kN>;
  using Gradient = Accumulator<1, kWholePanels<Config::kHeadDim> / 8>;
  using Operand = LeftOperand<T, 1, kN>;

 public:
  FA_DEVICE BackwardKeys(const BackwardParamsSm90& given, Shared& memory) : Base(given, memory) {}

  FA_DEVICE void run() {
    acc_dk.set_zero();
    acc_dv.set_zero();
    ptx::mbarrier_wait(&shared.keys_full, 0);
    const int steps = plan.steps();
#pragma unroll 1
    for (int n = 0; n < steps; ++n) {
      if (this->is_interior(plan.step_of(n).block)) {
        step<false>(n);
      } else {
        step<true>(n);
      }
    }
    if (ptx::lane_id() == 0) this->end_turn();
    const AttentionGradParams& g = params.gradient;
    store_key_rows<T>(acc_dk, plan, warp_row(), g.dkey, params.has_paired_dkey, p.head_dim,
                      params.scale);
    store_key_rows<T>(acc_dv, plan, warp_row(), g.dvalue, params.has_paired_dvalue, p.head_dim_v,
                      1.0f);
  }

 private:
  FA_DEVICE int warp_row() const {
    return 16 * warp;
  }

  template <bool kMasked>
  FA_DEVICE void step(int n) {
    shared.query_ring.wait_full(n);
    shared.dout_ring.wait_full(n);
    bool may_leak = false;  // did Q or dO hold what must not reach keys that they do not see?
    if constexpr (kMasked) {
      may_leak = this->stop_leaks(shared.query[n % kStages], shared.dout[n % kStages]);
    }
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
    if constexpr (kMasked) scores.mask_tile(this->place_of(n, first, warp_row()));
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
      add_dq(n, this->template share_ds<kMasked>());
    }
  }

  // The part of a group: rows of a panel of dS, columns of a panel of K.
  FA_DEVICE int dq_row_panel() const {
    return kQueries == 64 ? 0 : group();
  }
  FA_DEVICE int dq_column_panel() const {
    return kQueries == 64 ? group() : 0;
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
    const auto rows = this->dq_rows(n, row);
    this->begin_turn(rows, dq_column_panel());
    this->add_to_sums(acc, rows, dq_column_panel());
  }

  // Q and dO are used up when dK and dV are done, the newest products but kPending.
  template <int kPending>
  FA_DEVICE void release(int n) {
    wait_for<kPending>(acc_dv);
    ptx::wgmma_hold(acc_dk.x[0]);
    shared.dout_ring.release(n);
    shared.query_ring.release(n);
  }

  Gradient acc_dk, acc_dv;
};

template <typename T, int kDim, BackwardTileSm90 kTile>
FA_DEVICE void BackwardConfigSm90<T, kDim, kTile>::consume(const BackwardParamsSm90& params,
                                                           Shared& shared) {
  BackwardKeys<BackwardConfigSm90>(params, shared).run();
}

}  // namespace fastattn::cuda
