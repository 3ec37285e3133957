// Forward attention of few query rows over a long cache: as many rows as a product has, 16, of all
// heads of a group. What takes the time is to read K and V, so every warp by itself keeps a ring of
// tiles in flight, K and V in turn, and nothing in its loop waits for another warp. The warps of a
// block take turns along the keys of the block's part; at the end their results become one, and
// those of the parts of a sequence do in flash_combine.cuh.
#pragma once

#include "decode_stage.cuh"
#include "decode_tiles.h"
#include "forward_tile.cuh"

namespace fastattn::cuda {

// C: what keys and values are stored as, T or int8_t.
template <typename TypeT, typename TypeC, int kDim>
struct DecodeConfig {
  using T = TypeT;
  using C = TypeC;
  static constexpr DecodeTile kTile = decode_tile(sizeof(T), sizeof(C), kDim);
  static constexpr int kHeadDim = kDim, kRows = kDecodeRows;
  static constexpr int kWarps = kTile.warps, kThreads = 32 * kWarps;
  static constexpr int kKeys = kTile.keys, kStages = kTile.stages;
  static constexpr int kRoundKeys = kTile.round_keys();
  static constexpr bool kInt8 = sizeof(C) == 1;

  using Tile = SharedTile<T, kKeys, kHeadDim>;
  using Stage = std::conditional_t<kInt8, RawTile<kKeys, kHeadDim>, Tile>;
  struct Nothing {};
  struct Widening {
    Tile widened;  // K and V in turn
    float key_scale[kStages][kKeys], value_scale[kStages][kKeys];
  };
  // Of a warp.
  struct Ring : std::conditional_t<kInt8, Widening, Nothing> {
    Stage key[kStages], value[kStages];
  };
  // What the warps have found; columns are spaced so that eight rows meet no bank twice.
  struct Results {
    float row_max[kWarps][kRows], row_sum[kWarps][kRows];
    alignas(16) float out[kWarps][kRows][kHeadDim + 8];
  };
  struct Shared {
    ForwardPlan plan;
    SharedTile<T, kRows, kHeadDim> query;
    union {
      Ring ring[kWarps];
      Results results;
    };
  };
  static_assert(sizeof(Shared) <= kTile.shared_bytes(sizeof(T), sizeof(C), kDim));
};

template <typename Config>
class FlashDecode {
  using T = typename Config::T;
  using C = typename Config::C;
  using Tile = typename Config::Tile;
  using Stage = typename Config::Stage;
  using Scores = Accumulator<1, Config::kKeys / 8>;
  using Output = Accumulator<1, Config::kHeadDim / 8>;
  static constexpr int kWarps = Config::kWarps, kKeys = Config::kKeys, kStages = Config::kStages;
  // Groups of copies, each a tile of K or V: all but the oldest may be under way.
  static constexpr int kInFlight = 2 * kStages - 1;

 public:
  FA_DEVICE FlashDecode(const ForwardParams& given, typename Config::Shared& memory)
      : params(given),
        p(given.attention),
        shared(memory),
        plan(memory.plan),
        seq(plan.seq),
        // Divided as unsigned numbers, which shifts do: so are all places that follow from them.
        thread(static_cast<int>(threadIdx.x)),
        warp(static_cast<int>(threadIdx.x / ptx::kWarpSize)),
        lane(static_cast<int>(threadIdx.x % ptx::kWarpSize)),
        chunks{lane},
        ring(memory.ring[warp]),
        has_terms(cuda::has_terms(p)) {}

  FA_DEVICE void run() {
    if (thread == 0)
      shared.plan = ForwardPlan(params, blockIdx.x, Config::kRows, Config::kRoundKeys);
    ptx::sync_block();
    if (plan.tile.first >= seq.rows_q * plan.tile.pack) return;
    state.reset();
    acc_o.set_zero();
    if (plan.first_block < plan.last_block) attend();
    share_results();
    store();
  }

 private:
  FA_DEVICE void attend() {
    KeyCursor cursor(p, seq, origin_of(plan.first_block), lane % kKeys);
    load_q_tile();
    const int last = plan.last_block;
#pragma unroll 1
    for (int slot = 0; slot < kStages; ++slot) {
      const bool is_there = plan.first_block + slot < last;
      if (slot > 0) store_scales(slot - 1);
      load_k_tile<true>(cursor, slot, is_there);
      load_v_tile<true>(cursor, slot, is_there);
      cursor.advance(Config::kRoundKeys);
    }
    ptx::cp_async_wait<2 * kStages>();
    ptx::sync_block();  // the queries are there
    int slot = 0;
#pragma unroll 1
    for (int block = plan.first_block; block < last; ++block) {
      const bool has_next = block + kStages < last;
      if (is_interior(block)) {
        step<false>(cursor, block, slot, has_next);
      } else {
        step<true>(cursor, block, slot, has_next);
      }
      cursor.advance(Config::kRoundKeys);
      slot = slot + 1 < kStages ? slot + 1 : 0;
    }
  }

  FA_DEVICE bool is_interior(int block) const {
    return !has_terms && plan.first_interior <= block && block < plan.last_interior;
  }

  template <bool kMasked>
  FA_DEVICE void step(const KeyCursor& cursor, int block, int slot, bool has_next) {
    store_scales(slot > 0 ? slot - 1 : kStages - 1);
    ptx::cp_async_wait<kInFlight>();
    Scores scores;
    scores.set_zero();
    multiply_rows(scores, shared.query, 0, arrived(ring.key[slot]), 0);
    if constexpr (Config::kInt8) scale_columns(scores, ring.key_scale[slot]);
    ptx::sync_warp();  // K is used up
    load_k_tile<false>(cursor, slot, has_next);
    if constexpr (kMasked) mask_tile(scores, block);
    ptx::cp_async_wait<kInFlight>();
    // Does V hold what must not reach the rows that do not see it?
    bool may_leak = false;
    if constexpr (kMasked && !Config::kInt8) {
      may_leak = ptx::any_in_warp(chunks.hold_nonfinite(ring.value[slot]));
    }
    const Tile& value = arrived(ring.value[slot]);
    state.step(scores, unit(), acc_o);
    if constexpr (Config::kInt8) scale_columns(scores, ring.value_scale[slot]);
    const LeftOperand<T, 1, kKeys / 8> weights(scores);
    if (may_leak) {
      multiply_columns<kMasked && !Config::kInt8>(acc_o, weights, value);
    } else {
      multiply_columns<false>(acc_o, weights, value);
    }
    ptx::sync_warp();  // V is used up
    load_v_tile<false>(cursor, slot, has_next);
  }

  // What softmax runs on are scores, or, where they have no terms, products.
  FA_DEVICE float natural() const {
    return has_terms ? 1.0f : static_cast<float>(p.scale);
  }
  FA_DEVICE float unit() const {
    return natural() * kLog2e;
  }

  FA_DEVICE int64_t origin_of(int block) const {
    return static_cast<int64_t>(block) * Config::kRoundKeys + warp * kKeys;
  }

  FA_DEVICE void mask_tile(Scores& scores, int block) const {
    const int64_t j0 = origin_of(block);
    if (has_terms) add_terms(scores, p, plan, 0, j0);
    hide_keys(scores, p, plan, 0, j0);
  }

  // ---- Loads ------------------------------------------------------------------------------------

  FA_DEVICE void load_q_tile() {
    constexpr int kLoaders = 64;
    if (thread < kLoaders) {
      load_tile<kLoaders>(shared.query, thread, params.query,
                          QueryTileRows<T>(p.query, seq, plan.tile, seq.len_q));
    }
    ptx::cp_async_commit();
  }

  // A group of copies each, empty after the last tile.
  template <bool kFirst>
  FA_DEVICE void load_k_tile(const KeyCursor& cursor, int slot, bool is_there) {
    if (is_there) {
      load_rows<kFirst>(ring.key[slot], cursor, p.key, params.key);
      if constexpr (Config::kInt8) key_scale = scale_at(cursor, p.cache.key_scale);
    }
    ptx::cp_async_commit();
  }
  template <bool kFirst>
  FA_DEVICE void load_v_tile(const KeyCursor& cursor, int slot, bool is_there) {
    if (is_there) {
      load_rows<kFirst>(ring.value[slot], cursor, p.value, params.value);
      if constexpr (Config::kInt8) value_scale = scale_at(cursor, p.cache.value_scale);
    }
    ptx::cp_async_commit();
  }

  template <typename Data>
  FA_DEVICE const Data* head_of(const ConstTensor& tensor) const {
    return static_cast<const Data*>(tensor.data) + seq.b1 * tensor.stride[1] +
           plan.head_kv * tensor.stride[2];
  }

  template <bool kFirst>
  FA_DEVICE void load_rows(Stage& stage, const KeyCursor& cursor, const ConstTensor& tensor,
                           const ColumnLayout& layout) {
    const C* base = head_of<C>(tensor);
    chunks.template load<kFirst>(stage, cursor.in(base, tensor.stride), base, layout);
  }

  FA_DEVICE float scale_at(const KeyCursor& cursor, const ConstTensor& scale) const {
    const float* at = cursor.in(head_of<float>(scale), scale.stride);
    return at == nullptr ? 0.0f : *at;
  }

  // NOTE: not where they are loaded, which would be to wait for them.
  FA_DEVICE void store_scales(int slot) {
    if constexpr (Config::kInt8) {
      if (lane >= kKeys) return;
      ptx::store_shared(&ring.key_scale[slot][lane], key_scale);
      ptx::store_shared(&ring.value_scale[slot][lane], value_scale);
    }
  }

  // A tile that this lane's copies have reached, once those of the others have.
  FA_DEVICE const Tile& arrived(Stage& stage) {
    if constexpr (Config::kInt8) {
      chunks.widen(stage, ring.widened);
      ptx::sync_warp();
      return ring.widened;
    } else {
      ptx::sync_warp();
      return stage;
    }
  }

  // ---- Results ----------------------------------------------------------------------------------

  FA_DEVICE void share_results() {
    typename Config::Results& results = shared.results;
    ptx::sync_block();  // the rings are used up
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(0, 2 * half);
      const float row_sum = sum_of_row(state.row_sum[0][half]);
      if (lane % 4 == 0) {
        ptx::store_shared(&results.row_max[warp][r], state.row_max[0][half]);
        ptx::store_shared(&results.row_sum[warp][r], row_sum);
      }
#pragma unroll
      for (int n = 0; n < Output::kN; ++n) {
        const float* pair = &acc_o.x[0][n][2 * half];
        float* to = &results.out[warp][r][column_of(n, 0)];
        ptx::store_shared(reinterpret_cast<float2*>(to), float2{pair[0], pair[1]});
      }
    }
    ptx::sync_block();
  }

  static FA_DEVICE float2 scaled(const float2& x, float scale) {
    return scale == 0 ? float2{0.0f, 0.0f} : float2{x.x * scale, x.y * scale};
  }

  // A warp writes whole rows: what each warp has found, relative to the maximum of all.
  FA_DEVICE void store() {
    const typename Config::Results& results = shared.results;
#pragma unroll 1
    for (int r = warp; r < Config::kRows; r += kWarps) {
      const int64_t i = plan.tile.query(r), head = plan.tile.head(r);
      if (i >= seq.rows_q) continue;
      float share[kWarps], row_max = -infinity(), row_sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        share[w] = ptx::load_shared(&results.row_max[w][r]);
        row_max = fmaxf(row_max, share[w]);
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        share[w] = ptx::exp2((share[w] - (row_max == -infinity() ? 0.0f : row_max)) * unit());
        row_sum = fmaf(ptx::load_shared(&results.row_sum[w][r]), share[w], row_sum);
      }
      const RowResult row =
          result_of_row<Maximum::kScore>(params, seq, head, i, row_max * natural(), row_sum);
      if (lane == 0) store_lse(params, plan, head, i, row.lse);
      with_out_row<T>(params, plan, head, i, [&](auto* out, int64_t stride) {
#pragma unroll
        for (int column = 2 * lane; column < Config::kHeadDim; column += 64) {
          float2 sum = {0.0f, 0.0f};
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            const float* from = &results.out[w][r][column];
            const float2 pair = ptx::load_shared(reinterpret_cast<const float2*>(from));
            sum.x = fmaf(pair.x, share[w], sum.x);
            sum.y = fmaf(pair.y, share[w], sum.y);
          }
          // What a row without keys has gathered is not looked at.
          const float2 x = scaled(sum, row.output_scale);
          store_pair(out, stride, params.has_paired_out, column, p.head_dim_v, x.x, x.y);
        }
      });
    }
  }

  const ForwardParams& params;
  const AttentionParams& p;
  typename Config::Shared& shared;
  const ForwardPlan& plan;
  const Sequence& seq;
  const int thread, warp, lane;
  const LaneChunks<Stage, C> chunks;
  typename Config::Ring& ring;
  const bool has_terms;
  float key_scale = 0, value_scale = 0;  // of int8: on their way to the ring
  SoftmaxState<1, Maximum::kScore> state;
  Output acc_o;
};

template <typename Config>
FA_KERNEL(Config::kThreads, Config::kTile.most_blocks())
void flash_decode_sm80(const __grid_constant__ ForwardParams params) {
  FlashDecode<Config>(params, *static_cast<typename Config::Shared*>(ptx::shared_memory())).run();
}

}  // namespace fastattn::cuda
