// The same gradients by warpgroups with a role each, where dK and dV of one warpgroup would leave
// no registers for scores: beyond head_dim 128, and where scores have terms.
//
//   values: P^T = exp(K Q^T - lse);  dV += P^T dO
//   keys:   dS^T = P^T * (V dO^T - delta);  dK += dS^T Q
//   both:   dQ += dS K, each some columns
//
// P^T goes from one to the other through shared memory as it lies in registers, in float32; dS^T as
// in flash_bwd_sm90.cuh. So scores exist in one warpgroup and dP in the other.
#pragma once

#include "backward_sm90.cuh"

namespace fastattn::cuda {

template <typename TypeT, int kDim, int kDimV, bool kHasTerms>
struct BackwardRolesSm90 {
  using T = TypeT;
  static constexpr int kHeadDim = kDim, kHeadDimV = kDimV, kGroups = 2;
  static constexpr int kSumsHeadDim = kDim > 128 ? 256 : kDim;  // as all else that knows them
  static constexpr bool kTerms = kHasTerms;
  static constexpr int kThreads = ptx::kWarpgroupSize * (1 + kGroups);
  static constexpr int kConsumers = ptx::kWarpgroupSize * kGroups;
  static constexpr int kKeys = 64, kQueries = 64;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // Queries whose scores are in registers at a time: dV takes 128 at head_dim 256, and beside these
  // 64 scores and their slopes spill.
  static constexpr int kPart = kTerms && kHeadDimV > 128 ? 32 : 64;
  // Of two tiles of dO there is no room at head_dim 256. It is used up before Q.
  static constexpr int kStages = 2, kDoutStages = kHeadDimV > 192 ? 1 : 2;

  using KeyTile = PanelTile<T, kKeys, kHeadDim>;
  using ValueTile = PanelTile<T, kKeys, kHeadDimV>;
  struct Shared {
    alignas(1024) KeyTile key;
    alignas(1024) ValueTile value;
    alignas(1024) PanelTile<T, kQueries, kHeadDim> query[kStages];
    alignas(1024) PanelTile<T, kQueries, kHeadDimV> dout[kDoutStages];
    alignas(1024) PanelTile<T, kKeys, kQueries> ds;                  // transposed
    alignas(128) float4 weights[kQueries / 8][ptx::kWarpgroupSize];  // of each thread
    alignas(128) DqPart dq[4 * kGroups];                             // of each warp
    alignas(128) float row_lse[kStages][kQueries], delta[kDoutStages][kQueries];
    Ring<kStages> query_ring;
    Ring<kDoutStages> dout_ring;
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

template <typename Config>
class BackwardRole : protected BackwardConsumer<Config> {
 protected:
  using Base = BackwardConsumer<Config>;
  using Base::Base;
  using Base::kQueries, Base::kThreads, Base::kWeights;
  using Base::params, Base::p, Base::shared, Base::plan, Base::warp;
  using typename Base::Shared, typename Base::T, typename Base::PartOfDq;

  // step(n, masked): masked is std::true_type where some scores of the step are hidden.
  template <typename Step>
  FA_DEVICE void for_each_step(const Step& step) {
    ptx::mbarrier_wait(&shared.keys_full, 0);
    const int steps = plan.steps();
#pragma unroll 1
    for (int n = 0; n < steps; ++n) {
      if (needs_no_mask(plan.step_of(n).block)) {
        step(n, std::false_type{});
      } else {
        step(n, std::true_type{});
      }
    }
    if (ptx::lane_id() == 0) this->end_turn();
  }

  FA_DEVICE bool needs_no_mask(int block) const {
    if (Config::kTerms && (p.mask.data != nullptr || p.bias.data != nullptr)) return false;
    return this->is_interior(block);
  }

  FA_DEVICE int warp_row() const {
    return 16 * (warp % 4);
  }
  FA_DEVICE auto& query(int n) const {
    return shared.query[n % Config::kStages];
  }
  FA_DEVICE auto& dout(int n) const {
    return shared.dout[n % Config::kDoutStages];
  }
  // Of the query of an element, counted from `first`.
  FA_DEVICE auto row_lse(int n, int first) const {
    const float* of_rows = shared.row_lse[n % Config::kStages] + first;
    return [=](int, int c, int e) { return of_column(of_rows, c, e); };
  }
  FA_DEVICE auto delta(int n, int first) const {
    const float* of_rows = shared.delta[n % Config::kDoutStages] + first;
    return [=](int, int c, int e) { return of_column(of_rows, c, e); };
  }

  // Both roles wait for both tiles in a step with a mask. Whether Q or dO held what must not reach
  // keys that they do not see.
  template <bool kMasked>
  FA_DEVICE bool stop_leaks(int n) {
    if constexpr (!kMasked) return false;
    shared.query_ring.wait_full(n);
    shared.dout_ring.wait_full(n);
    return Base::stop_leaks(query(n), dout(n));
  }

  // dQ of panels `first` to `last` of K.
  FA_DEVICE void add_dq(int n, bool key_leaks, int first, int last) {
    const auto rows = this->dq_rows(n, warp_row());
    this->begin_turn(rows, this->group());
#pragma unroll 1
    for (int panel = first; panel < last; ++panel) {
      PartOfDq acc;
      if (key_leaks) {
        acc.set_zero();
        multiply_transposed<true>(acc, shared.ds, warp_row(), shared.key, kPanelElements * panel);
      } else {
        begin_multiply_transposed(acc, shared.ds, 0, shared.key, panel);
        wait_for<0>(acc);
      }
      this->add_to_sums(acc, rows, panel);
    }
  }

  static constexpr int kPanels = kWholePanels<Config::kHeadDim> / kPanelElements;
  static constexpr int kMiddlePanel = (kPanels + 1) / 2;
};

// The role that has the scores.
template <typename Config>
class BackwardValueRole : BackwardRole<Config> {
  using Role = BackwardRole<Config>;
  using Role::params, Role::p, Role::shared, Role::plan;
  using typename Role::Shared, typename Role::T;
  static constexpr int kN = Config::kPart / 8;
  using Scores = BackwardScores<true, Config::kTerms, 1, kN>;
  using Tile = Accumulator<1, kN>;

 public:
  FA_DEVICE BackwardValueRole(const BackwardParamsSm90& given, Shared& memory)
      : Role(given, memory) {}

  FA_DEVICE void run() {
    acc_dv.set_zero();
    this->for_each_step([&](int n, auto masked) { step<masked.value>(n); });
    store_key_rows<T>(acc_dv, plan, this->warp_row(), params.gradient.dvalue,
                      params.has_paired_dvalue, p.head_dim_v, 1.0f);
  }

 private:
  template <bool kMasked>
  FA_DEVICE void step(int n) {
    const bool may_leak = this->template stop_leaks<kMasked>(n);
    if constexpr (!kMasked) shared.query_ring.wait_full(n);
    if constexpr (!kMasked) shared.dout_ring.wait_full(n);
#pragma unroll 1
    for (int first = 0; first < Role::kQueries; first += Config::kPart) {
      add_part<kMasked>(n, first, may_leak);
    }
    ptx::sync_warp();  // all lanes have read the lse of their queries
    shared.query_ring.release(n);
    shared.dout_ring.release(n);
    this->add_dq(n, this->template share_ds<kMasked>(), 0, Role::kMiddlePanel);
  }

  // Queries `first` to first + kPart - 1 of the step.
  template <bool kMasked>
  FA_DEVICE void add_part(int n, int first, bool may_leak) {
    Scores scores;
    begin_multiply_rows<Config::kHeadDim>(scores.weights, shared.key, 0, this->query(n), first);
    wait_for<0>(scores.weights);
    const auto place = this->place_of(n, first, this->warp_row());
    if constexpr (kMasked || Config::kTerms) scores.mask_tile(place);
    scores.template recompute_p<kMasked>(params.unit, this->row_lse(n, first));
    if constexpr (Config::kTerms) scores.drop(place);
    Tile kept = scores.survivors(params.survivor);
    if (kMasked && may_leak) spread_nonfinite(kept, this->delta(n, first));
    const LeftOperand<T, 1, kN> operand(kept);
    scores.through_softcap();
    lay_down(scores.weights, first);
    if (first + Config::kPart == Role::kQueries) {
      ptx::arrive_named(Role::kWeights, Role::kThreads);
    }
    begin_multiply_columns(acc_dv, operand, this->dout(n), first);
    wait_for<0>(acc_dv);
  }

  FA_DEVICE void lay_down(const Tile& weights, int first) {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      const float* x = weights.x[0][c];
      ptx::store_shared(&shared.weights[first / 8 + c][this->thread()],
                        make_float4(x[0], x[1], x[2], x[3]));
    }
  }

  Accumulator<1, kWholePanels<Config::kHeadDimV> / 8> acc_dv;
};

// The role that has dP and dS.
template <typename Config>
class BackwardKeyRole : BackwardRole<Config> {
  using Role = BackwardRole<Config>;
  using Role::params, Role::p, Role::shared, Role::plan;
  using typename Role::Shared, typename Role::T;
  static constexpr int kN = Role::kQueries / 8;
  using Scores = BackwardScores<true, Config::kTerms, 1, kN>;
  using Tile = Accumulator<1, kN>;

 public:
  FA_DEVICE BackwardKeyRole(const BackwardParamsSm90& given, Shared& memory)
      : Role(given, memory) {}

  FA_DEVICE void run() {
    acc_dk.set_zero();
    this->for_each_step([&](int n, auto masked) { step<masked.value>(n); });
    store_key_rows<T>(acc_dk, plan, this->warp_row(), params.gradient.dkey, params.has_paired_dkey,
                      p.head_dim, params.scale);
  }

 private:
  template <bool kMasked>
  FA_DEVICE void step(int n) {
    this->template stop_leaks<kMasked>(n);
    if constexpr (!kMasked) shared.dout_ring.wait_full(n);
    Tile ds;
    begin_multiply_rows<Config::kHeadDimV>(ds, shared.value, 0, this->dout(n));
    wait_for<0>(ds);
    Scores scores;
    take_over(scores.weights);
    scores.template to_ds<kMasked>(ds, params.survivor, this->delta(n, 0));
    ptx::sync_warp();  // and all lanes delta
    shared.dout_ring.release(n);
    const LeftOperand<T, 1, kN> operand(ds);
    store_operand(operand, shared.ds, this->warp_row(), 0);
    ptx::fence_async_proxy();
    if constexpr (!kMasked) shared.query_ring.wait_full(n);
    begin_multiply_columns(acc_dk, operand, this->query(n));
    const bool key_leaks = this->template share_ds<kMasked>();
    wait_for<0>(acc_dk);
    shared.query_ring.release(n);
    this->add_dq(n, key_leaks, Role::kMiddlePanel, Role::kPanels);
  }

  FA_DEVICE void take_over(Tile& weights) {
    ptx::sync_named(Role::kWeights, Role::kThreads);
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      const float4 x = ptx::load_shared(&shared.weights[c][this->thread() % ptx::kWarpgroupSize]);
      const float four[] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) weights.x[0][c][e] = four[e];
    }
  }

  Accumulator<1, kWholePanels<Config::kHeadDim> / 8> acc_dk;
};

template <typename T, int kDim, int kDimV, bool kHasTerms>
FA_DEVICE void BackwardRolesSm90<T, kDim, kDimV, kHasTerms>::consume(
    const BackwardParamsSm90& params, Shared& shared) {
  if (threadIdx.x < 2 * ptx::kWarpgroupSize) {
    BackwardValueRole<BackwardRolesSm90>(params, shared).run();
  } else {
    BackwardKeyRole<BackwardRolesSm90>(params, shared).run();
  }
}

}  // namespace fastattn::cuda
