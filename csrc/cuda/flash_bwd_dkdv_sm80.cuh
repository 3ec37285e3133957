// Gradients of one tile of keys and their values (Dao, 2023, "FlashAttention-2"): the block goes
// through the queries that see them, of every head of the group, in a fixed order. Scores are
// transposed, so that what has been made of them lies in registers as the next product needs it:
//
//   P^T = exp(K Q^T - lse);  dP^T = V dO^T;  dS^T = P^T * (dP^T - delta)
//   dV += P^T dO;  dK += dS^T Q
#pragma once

#include "backward_scores.cuh"

namespace fastattn::cuda {

// Which part of the problem a block has, in shared memory.
struct DkDvPlan {
  Sequence seq;
  int64_t head_kv, first_head, first_key;
  int group;                          // heads that share these keys
  int first_block, last_block;        // tiles of queries of which some see some of the keys
  int first_interior, last_interior;  // of these, those of which all see all

  FA_DEVICE DkDvPlan(const BackwardParams& params, int keys, int queries) {
    const AttentionParams& p = params.gradient.forward;
    const uint32_t nth = blockIdx.x % params.tiles, index = blockIdx.x / params.tiles;
    head_kv = index % p.heads_kv;
    seq = sequence_at(p, index / p.heads_kv);
    group = static_cast<int>(p.heads_q / p.heads_kv);
    first_head = head_kv * group;
    first_key = static_cast<int64_t>(nth) * keys;
    first_block = last_block = first_interior = last_interior = 0;
    const Range tile = {first_key, min_of(first_key + keys, seq.len_k)};
    if (is_empty(tile)) return;
    const Range any = intersect(rows_seeing_any(p, seq, tile), {0, seq.len_q});
    const Range all = rows_seeing_all(p, seq, {first_key, first_key + keys});
    if (is_empty(any)) return;
    first_block = static_cast<int>(any.first / queries);
    last_block = static_cast<int>(ceil_div(any.last, queries));
    first_interior = static_cast<int>(ceil_div(max_of<int64_t>(all.first, 0), queries));
    last_interior = static_cast<int>(max_of<int64_t>(all.last, 0) / queries);
  }
};

// kWithDk, kWithDv: which of the two gradients; where both do not fit the registers, one at a time.
template <typename TypeT, int kDim, DkDvTile kTile, bool kWithTerms, bool kWithDk, bool kWithDv>
struct DkDvConfig {
  using T = TypeT;
  static constexpr int kHeadDim = kDim, kThreads = 32 * kTile.warps, kM = kTile.row_tiles;
  static constexpr int kKeys = kTile.keys(), kQueries = kTile.queries, kStages = kTile.stages;
  static constexpr bool kTerms = kWithTerms, kDk = kWithDk, kDv = kWithDv;

  // A tile of queries.
  struct Stage {
    SharedTile<T, kQueries, kHeadDim> query, dout;
    alignas(16) RowStats stats[kQueries];
  };
  struct None {};
  struct Shared {
    DkDvPlan plan;
    SharedTile<T, kKeys, kHeadDim> key;
    std::conditional_t<kDk, SharedTile<T, kKeys, kHeadDim>, None> value;
    Stage stages[kStages];
  };
};

template <typename Config>
class FlashDkDv {
  using T = typename Config::T;
  using Stage = typename Config::Stage;
  static constexpr int kM = Config::kM, kThreads = Config::kThreads, kStages = Config::kStages;
  static constexpr int kKeys = Config::kKeys, kQueries = Config::kQueries, kN = kQueries / 8;
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
        thread(static_cast<int>(threadIdx.x)),
        warp_row(thread / 32 * 16 * kM) {}

  FA_DEVICE void run() {
    if (thread == 0) shared.plan = DkDvPlan(params, kKeys, kQueries);
    ptx::sync_block();
    if (plan.first_key >= seq.rows_k) return;
    if constexpr (Config::kDk) acc_dk.set_zero();
    if constexpr (Config::kDv) acc_dv.set_zero();
    if (plan.first_block < plan.last_block) {
      load_kv_tile();
      load_q_tile({0, plan.first_block}, 0);
      int stage = 0;
      for (Step at = {0, plan.first_block}; at.head < plan.group;) {
        Step next = {at.head, at.block + 1};
        if (next.block == plan.last_block) next = {at.head + 1, plan.first_block};
        if (is_interior(at.block)) {
          step<false>(at, next, stage);
        } else {
          step<true>(at, next, stage);
        }
        at = next;
        stage = kStages - 1 - stage;
      }
    }
    store();
  }

 private:
  struct Step {
    int head, block;  // of the group; a tile of queries
  };

  FA_DEVICE bool is_interior(int block) const {
    return !Config::kTerms && plan.first_interior <= block && block < plan.last_interior;
  }

  template <bool kMasked>
  FA_DEVICE void step(Step at, Step next, int stage_index) {
    const Stage& stage = shared.stages[stage_index];
    ptx::cp_async_wait<0>();
    bool may_leak = false;  // do Q or dO hold what must not reach keys that they do not see?
    if constexpr (kMasked) {
      may_leak = ptx::sync_block_or(share_is_nonfinite<kThreads>(stage.query, thread) ||
                                    share_is_nonfinite<kThreads>(stage.dout, thread));
    } else {
      ptx::sync_block();
    }
    // This step is there, and the one before is used up.
    if (kStages > 1 && next.head < plan.group) load_q_tile(next, kStages - 1 - stage_index);
    if (kMasked && may_leak) {
      add_tile<kMasked, true>(at, stage);
    } else {
      add_tile<kMasked, false>(at, stage);
    }
    if (kStages == 1) {
      ptx::sync_block();
      if (next.head < plan.group) load_q_tile(next, 0);
    }
  }

  template <bool kMasked, bool kGuarded>
  FA_DEVICE void add_tile(Step at, const Stage& stage) {
    const ScorePlace<true> place = {p, seq, plan.first_head + at.head, plan.first_key + warp_row,
                                    first_query(at)};
    const auto stats = [&](int, int n, int e) {
      const float4 pair =
          ptx::load_shared(reinterpret_cast<const float4*>(stage.stats + column_of(n, 0)));
      return e % 2 == 0 ? RowStats{pair.x, pair.y} : RowStats{pair.z, pair.w};
    };
    Scores scores;
    scores.weights.set_zero();
    multiply_rows(scores.weights, shared.key, warp_row, stage.query, 0);
    if constexpr (kMasked) scores.mask_tile(place);
    scores.template recompute_p<kMasked>(score_unit<Config::kTerms>(p), stats);
    if constexpr (Config::kTerms) scores.drop(place);
    const float survivor = Scores::survivor_of(p);
    Tile ds;
    if constexpr (Config::kDk) {
      ds.set_zero();
      multiply_rows(ds, shared.value, warp_row, stage.dout, 0);
      scores.template to_ds<kMasked>(ds, survivor, stats);
      scores.through_softcap(ds);
    }
    if constexpr (Config::kDv) {
      scores.keep_survivors(survivor);
      multiply_columns<kGuarded>(acc_dv, Operand(scores.weights), stage.dout);
    }
    if constexpr (Config::kDk) multiply_columns<kGuarded>(acc_dk, Operand(ds), stage.query);
  }

  FA_DEVICE int64_t first_query(Step at) const {
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

  FA_DEVICE void load_q_tile(Step at, int stage_index) {
    Stage& stage = shared.stages[stage_index];
    const QueryTile tile = {plan.first_head + at.head, first_query(at), 1};
    load_tile<kThreads>(stage.query, thread, params.query,
                        QueryTileRows<T>(p.query, seq, tile, seq.len_q));
    load_tile<kThreads>(stage.dout, thread, params.dout,
                        QueryTileRows<T>(g.dout, seq, tile, seq.len_q));
    constexpr int kPerChunk = 16 / sizeof(RowStats);
    if (thread < kQueries / kPerChunk) {
      const RowStats* from = params.stats + tile.first_head * params.padded_rows +
                             padded_row(p, seq.index, seq.first_q) + tile.first;
      ptx::cp_async_16(stage.stats + thread * kPerChunk, from + thread * kPerChunk, 16);
    }
    ptx::cp_async_commit();
  }

  FA_DEVICE void store() {
    if constexpr (Config::kDk) {
      store_rows(acc_dk, g.dkey, params.has_paired_dkey, p.head_dim, static_cast<float>(p.scale));
    }
    if constexpr (Config::kDv) {
      store_rows(acc_dv, g.dvalue, params.has_paired_dvalue, p.head_dim_v, 1.0f);
    }
  }

  FA_DEVICE void store_rows(const Gradient& acc, const MutableTensor& to, bool is_paired,
                            int64_t columns, float factor) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t j = plan.first_key + warp_row + row_of(m, 2 * half);
        if (j >= seq.rows_k) continue;
        T* row = static_cast<T*>(to.data) + offset_of(to.stride, seq.b0, seq.b1, plan.head_kv) +
                 (seq.first_k + j) * to.stride[3];
#pragma unroll
        for (int n = 0; n < Gradient::kN; ++n) {
          const float* pair = &acc.x[m][n][2 * half];
          store_pair(row, to.stride[4], is_paired, column_of(n, 0), columns, pair[0] * factor,
                     pair[1] * factor);
        }
      }
    }
  }

  const BackwardParams& params;
  const AttentionGradParams& g;
  const AttentionParams& p;
  typename Config::Shared& shared;
  const DkDvPlan& plan;
  const Sequence& seq;
  const int thread, warp_row;
  Gradient acc_dk, acc_dv;
};

template <typename Config>
FA_KERNEL(Config::kThreads, 1)
void flash_bwd_dkdv_sm80(const __grid_constant__ BackwardParams params) {
  FlashDkDv<Config>(params, *static_cast<typename Config::Shared*>(ptx::shared_memory())).run();
}

}  // namespace fastattn::cuda
