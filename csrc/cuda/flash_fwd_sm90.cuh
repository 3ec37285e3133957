// Forward attention on Hopper: the same tiles and the same online softmax as flash_fwd_sm80.cuh,
// but the products are those of warpgroups, asynchronous, and operands come by TMA (Shah et al.,
// 2024, "FlashAttention-3").
//
// One warp fills the rings of K and V, from contiguous rows or from those of pages; two or three
// warpgroups, 64 rows of queries each, use them up. Two things hide softmax behind products: a
// warpgroup computes the scores of a tile of keys while its weights of the tile before meet their
// values, and warpgroups take turns at beginning products, so that one computes softmax while
// another multiplies. Blocks stay and take tile after tile.
#pragma once

#include "forward_schedule.h"
#include "forward_tile.cuh"
#include "ring.cuh"
#include "tiles.h"
#include "wgmma_tile.cuh"

namespace fastattn::cuda {

template <typename TypeT, int kDim, int kDimV, ForwardTileSm90 kTile, bool kWithTerms>
struct ForwardConfigSm90 {
  using T = TypeT;
  static constexpr int kHeadDim = kDim, kHeadDimV = kDimV, kGroups = kTile.warpgroups;
  static constexpr int kThreads = ptx::kWarpgroupSize * (1 + kGroups);
  static constexpr int kQueries = kTile.queries(), kKeys = kTile.keys, kStages = kTile.stages;
  static constexpr bool kTerms = kWithTerms, kTakesTurns = kTile.takes_turns;
  static constexpr Maximum kMaximum = kTerms ? Maximum::kScore : Maximum::kExponent;
  // Of the 65536 registers, the warps that load need few: 128 threads of them and of each group.
  static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 56;
  static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 152;

  struct Shared {
    alignas(1024) PanelTile<T, kQueries, kHeadDim> query;
    alignas(1024) PanelTile<T, kKeys, kHeadDim> key[kStages];
    alignas(1024) PanelTile<T, kKeys, kHeadDimV> value[kStages];
    Ring<1> query_ring;
    Ring<kStages> key_ring, value_ring;
    ForwardPlan plan[2];  // of this tile and of the next one, which may be on its way

    FA_DEVICE void init() {
      constexpr int kWarps = 4 * kGroups;
      query_ring.init(kWarps);
      key_ring.init(kWarps);
      value_ring.init(kWarps);
      ptx::mbarrier_fence_init();
    }
  };
};

// The warp that loads. A tile of keys comes in boxes of rows that lie together in memory, of which
// each lane has one: a tile of a tensor is one box, a tile of a paged cache has some for each page.
template <typename Config>
class ForwardProducer {
  using Shared = typename Config::Shared;
  static constexpr int kKeys = Config::kKeys;

 public:
  FA_DEVICE ForwardProducer(const ForwardParamsSm90& given, Shared& memory)
      : params(given), p(given.base.attention), shared(memory) {}

  FA_DEVICE void run() {
    ptx::tma_prefetch_map(&params.query_map);
    ptx::tma_prefetch_map(&params.key_map);
    ptx::tma_prefetch_map(&params.value_map);
    uint32_t nth = 0, loaded = 0;
    for (uint32_t tile = blockIdx.x; tile < params.schedule.count; tile += gridDim.x, ++nth) {
      ForwardPlan& plan = shared.plan[nth % 2];
      if (ptx::lane_id() == 0) {
        // NOTE: whoever has released the queries of the tile before has done with the plan of the
        // one before that, which lies in the same place.
        shared.query_ring.wait_empty(nth);
        plan = ForwardPlan(params.base, tile_at(params.schedule, tile), Config::kQueries, kKeys);
        load_q_tile(plan, nth);
      }
      ptx::sync_warp();  // the plan is there
      for (int block = plan.first_block; block < plan.last_block; ++block) {
        load_kv_tile(plan, block, loaded++);
      }
    }
  }

 private:
  // Nothing where the tile sees no keys.
  FA_DEVICE void load_q_tile(const ForwardPlan& plan, uint32_t nth) {
    constexpr int kRowBytes = sizeof(shared.query) / Config::kQueries;
    const bool is_needed = plan.first_block < plan.last_block;
    ptx::Barrier* barrier =
        shared.query_ring.begin_fill(nth, is_needed ? params.query_rows * kRowBytes : 0);
    if (!is_needed) return;
    const int head = static_cast<int>(plan.tile.first_head);
    const int row = static_cast<int>(plan.seq.first_q + plan.tile.query(0));
    load_panels(shared.query, &params.query_map, p.cu_seqlens_q, head, row, plan.seq, barrier);
  }

  // NOTE: the block table is read before the waits, under which its latency passes.
  FA_DEVICE void load_kv_tile(const ForwardPlan& plan, int block, uint32_t n) {
    const Place place = place_of(plan.seq, static_cast<uint32_t>(block) * kKeys + first_row());
    load_key_rows(shared.key, shared.key_ring, &params.key_map, plan, place, n);
    load_key_rows(shared.value, shared.value_ring, &params.value_map, plan, place, n);
  }

  // Of this lane's box in a tile; kKeys or more: it has none.
  FA_DEVICE int first_row() const {
    return ptx::lane_id() * params.box_rows;
  }

  // Of the first row of a box: in a tensor, or in a page or ring, and which of these.
  struct Place {
    int row, entry;
  };
  FA_DEVICE Place place_of(const Sequence& seq, uint32_t key) const {
    const CacheView& cache = p.cache;
    if (!has_row_table(cache)) {
      return {static_cast<int>(seq.first_k + key),
              p.cu_seqlens_k.data != nullptr ? 0 : static_cast<int>(seq.b0)};
    }
    const auto rows = static_cast<uint32_t>(rows_of_entry(cache));
    const uint32_t page = key / rows;
    const int row = static_cast<int>(key - page * rows);
    // Of rows that none looks for the table may know nothing: behind the last entry are zeros.
    const bool is_seen = key < seq.len_k && key + params.box_rows > seq.first_seen;
    if (!is_seen) return {row, static_cast<int>(cache.entries)};
    return {row, static_cast<int>(cache.page_rows > 0 ? cache_page(cache, seq, page) : seq.b0)};
  }

  template <typename Tile, int kStages>
  FA_DEVICE void load_key_rows(Tile (&tiles)[kStages], Ring<kStages>& ring, const TensorMap* map,
                               const ForwardPlan& plan, const Place& place, uint32_t n) {
    if (ptx::lane_id() == 0) {
      ring.wait_empty(n);
      ring.begin_fill(n, sizeof(Tile));
    }
    ptx::sync_warp();  // NOTE: a lane that waited by itself could fall behind by a whole phase
    if (first_row() >= kKeys) return;
    const int head = static_cast<int>(plan.head_kv), b1 = static_cast<int>(plan.seq.b1);
    load_panels(tiles[n % kStages], first_row(), map, {place.row, head, b1, place.entry},
                &ring.full[n % kStages]);
  }

  const ForwardParamsSm90& params;
  const AttentionParams& p;
  Shared& shared;
};

// A warpgroup that computes.
template <typename Config>
class ForwardConsumer {
  using T = typename Config::T;
  using Shared = typename Config::Shared;
  static constexpr int kKeys = Config::kKeys;
  using Scores = Accumulator<1, kKeys / 8>;
  using Output = Accumulator<1, kWholePanels<Config::kHeadDimV> / 8>;
  using Weights = LeftOperand<T, 1, kKeys / 8>;
  using State = SoftmaxState<1, Config::kMaximum>;

 public:
  FA_DEVICE ForwardConsumer(const ForwardParamsSm90& given, Shared& memory)
      : params(given.base), schedule(given.schedule), p(given.base.attention), shared(memory) {}

  FA_DEVICE void run() {
    begin_turns();
    uint32_t nth = 0;
    for (uint32_t tile = blockIdx.x; tile < schedule.count; tile += gridDim.x, ++nth) {
      shared.query_ring.wait_full(nth);
      attend(shared.plan[nth % 2], nth);
    }
    end_turns();
  }

 private:
  FA_DEVICE void attend(const ForwardPlan& plan, uint32_t nth) {
    state.reset();
    acc_o.set_zero();
    const int last = plan.last_block, last_interior = min_of(last, plan.last_interior);
    int block = plan.first_block;
    if (kPassesOver && !has_rows(plan)) pass_over(last - block), block = last;
    while (block < last) {
      if (!Config::kTerms && plan.first_interior <= block && block < last_interior) {
        attend_interior(last_interior - block);
        block = last_interior;
      } else {
        attend_masked(plan, block++);
      }
    }
    ptx::sync_warp();  // all lanes have done with the plan of the tile before
    shared.query_ring.release(nth);
    finalize(acc_o, state, params, plan, warp_row());
    if (params.splits > 1) {
      store_part(acc_o, params, plan, warp_row());
    } else {
      store_out(plan);
    }
  }

  // Few queries leave a warpgroup without any. NOTE: in the kernel without turns, of head_dim 256,
  // this branch would move the wait for the products before softmax.
  static constexpr bool kPassesOver = Config::kTakesTurns;
  FA_DEVICE bool has_rows(const ForwardPlan& plan) const {
    return plan.tile.first + 64 * group() < plan.seq.len_q * plan.tile.pack;
  }

  // Its part in `count` tiles of keys that it does not need: what others wait for. The turn says
  // that those before, who have rows, have used up what was in these buffers before.
  FA_DEVICE void pass_over(int count) {
    for (; count > 0; --count) {
      wait_for_turn();
      give_turn();
      shared.key_ring.release(used);
      shared.value_ring.release(used++);
    }
  }

  // `count` tiles of keys, seen whole by every row: the scores of one while the weights of the one
  // before it meet their values.
  FA_DEVICE void attend_interior(int count) {
    Weights weights = first_weights();
#pragma unroll 1
    for (; count > 1; --count) {
      Scores scores;
      shared.key_ring.wait_full(used + 1);
      wait_for_turn();
      qk_gemm(scores, used + 1);
      shared.value_ring.wait_full(used);
      pv_gemm(weights);
      give_turn();
      wait_for<1>(scores);
      shared.key_ring.release(used + 1);
      const auto growth = state.raise_max(scores, unit());
      state.weigh(scores, unit());
      ptx::wgmma_hold(scores.x[0]);  // here, while the products run, and not behind the wait
      wait_for<0>(acc_o);
      shared.value_ring.release(used++);
      State::rescale(acc_o, growth);
      weights = Weights(scores);
    }
    shared.value_ring.wait_full(used);
    pv_gemm(weights);
    wait_for<0>(acc_o);
    shared.value_ring.release(used++);
  }

  FA_DEVICE Weights first_weights() {
    Scores scores;
    compute_scores(scores);
    state.step(scores, unit(), acc_o);
    return Weights(scores);
  }

  // A tile of keys that some rows do not see, or whose scores have terms.
  FA_DEVICE void attend_masked(const ForwardPlan& plan, int block) {
    const int64_t j0 = static_cast<int64_t>(block) * kKeys;
    Scores scores;
    compute_scores(scores);
    if constexpr (Config::kTerms) add_terms(scores, p, plan, warp_row(), j0);
    hide_keys(scores, p, plan, warp_row(), j0);
    state.step(scores, unit(), acc_o);
    if constexpr (Config::kTerms) drop_weights(scores, p, plan, warp_row(), j0);
    const Weights weights(scores);
    shared.value_ring.wait_full(used);
    const auto& value = value_of(used);
    const int thread = static_cast<int>(threadIdx.x) % ptx::kWarpgroupSize;
    // Does V hold what must not reach the rows that do not see it?
    const bool may_leak =
        ptx::sync_named_or(kOwn + group(), ptx::kWarpgroupSize,
                           share_is_nonfinite<ptx::kWarpgroupSize>(value, thread));
    if (may_leak) {
      multiply_columns<true>(acc_o, weights, value);
      ptx::sync_warp();  // all lanes have used it up
    } else {
      pv_gemm(weights);
      wait_for<0>(acc_o);
    }
    shared.value_ring.release(used++);
  }

  FA_DEVICE void compute_scores(Scores& scores) {
    shared.key_ring.wait_full(used);
    wait_for_turn();
    qk_gemm(scores, used);
    give_turn();
    wait_for<0>(scores);
    shared.key_ring.release(used);
  }

  FA_DEVICE void qk_gemm(Scores& scores, uint32_t n) {
    begin_multiply_rows<Config::kHeadDim>(scores, shared.query, 64 * group(),
                                          shared.key[n % Config::kStages]);
  }
  FA_DEVICE void pv_gemm(const Weights& weights) {
    begin_multiply_columns(acc_o, weights, value_of(used));
  }

  FA_DEVICE const auto& value_of(uint32_t n) const {
    return shared.value[n % Config::kStages];
  }

  FA_DEVICE float unit() const {
    return Config::kTerms ? kLog2e : static_cast<float>(p.scale) * kLog2e;
  }

  // Made whenever they are needed: registers are for the tiles.
  static FA_DEVICE int group() {
    return static_cast<int>(threadIdx.x) / ptx::kWarpgroupSize - 1;
  }
  static FA_DEVICE int warp_row() {
    return (static_cast<int>(threadIdx.x) / ptx::kWarpSize - 4) * 16;
  }

  // ---- Turns ------------------------------------------------------------------------------------

  // Named barriers: one a group, on which it waits for its turn; and one a group for its own use.
  enum { kTurn = 1, kOwn = kTurn + Config::kGroups };
  static constexpr int kTurnThreads = 2 * ptx::kWarpgroupSize;  // who waits and who gives

  // The first turn is that of group 0; the one that is left over in the end is taken by it too.
  FA_DEVICE void begin_turns() {
    if (Config::kTakesTurns && group() == Config::kGroups - 1) give_turn();
  }
  FA_DEVICE void end_turns() {
    if (Config::kTakesTurns && group() == 0) wait_for_turn();
  }
  FA_DEVICE void wait_for_turn() {
    if constexpr (Config::kTakesTurns) ptx::sync_named(kTurn + group(), kTurnThreads);
  }
  FA_DEVICE void give_turn() {
    if constexpr (Config::kTakesTurns) {
      ptx::arrive_named(kTurn + (group() + 1) % Config::kGroups, kTurnThreads);
    }
  }

  // ---- Results ----------------------------------------------------------------------------------

  // Four lanes hold a row of 8 columns between them, a word each: of four such tiles each lane
  // collects one, and stores it as a chunk. Neither shared memory nor a barrier is needed, and Q's
  // place is free for the next tile's.
  FA_DEVICE void store_out(const ForwardPlan& plan) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row() + row_of(0, 2 * half);
      const int64_t i = plan.tile.query(r);
      T* row = row_of_result<T>(p.out, plan.seq, plan.tile.head(r), i);
#pragma unroll
      for (int n = 0; n < Output::kN; n += 4) {
        Chunk chunk;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float* pair = &acc_o.x[0][n + w][2 * half];
          chunk.word[w] = ptx::pack(pair[0], pair[1], T{});
        }
        transpose_among_four(chunk);
        const int column = 8 * (n + ptx::lane_id() % 4);
        if (i < plan.seq.rows_q) store_chunk(row, params.out, column, chunk);
      }
    }
  }

  const ForwardParams& params;
  const TileSchedule& schedule;
  const AttentionParams& p;
  Shared& shared;
  uint32_t used = 0;  // tiles of values; those of keys are as many, or one ahead
  State state;
  Output acc_o;
};

template <typename Config>
FA_KERNEL(Config::kThreads, 1)
void flash_fwd_sm90(const __grid_constant__ ForwardParamsSm90 params) {
  auto& shared = *static_cast<typename Config::Shared*>(ptx::shared_memory_1024());
  if (threadIdx.x == 0) shared.init();
  ptx::sync_block();
  if (threadIdx.x < ptx::kWarpgroupSize) {
    ptx::fewer_registers<Config::kProducerRegisters>();
    if (threadIdx.x < ptx::kWarpSize) ForwardProducer<Config>(params, shared).run();
  } else {
    ptx::more_registers<Config::kConsumerRegisters>();
    ForwardConsumer<Config>(params, shared).run();
  }
}

}  // namespace fastattn::cuda
