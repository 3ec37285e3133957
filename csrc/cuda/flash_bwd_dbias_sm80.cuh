// Gradient of the bias: dS, summed over everything that the bias was broadcast over. A block owns a
// tile of the bias's own elements and goes through all queries and keys that they were added for,
// in a fixed order.
#pragma once

#include "backward_scores.cuh"

namespace fastattn::cuda {

// Where the bias is broadcast (stride 0) the block has the whole of a dimension, else one entry or
// tile.
struct DbiasPlan {
  Sequence seq;  // the one at hand
  Range batch0, batch1, heads, tiles, blocks;

  FA_DEVICE DbiasPlan(const AttentionGradParams& g, int queries, int keys) {
    const AttentionParams& p = g.forward;
    uint32_t index = blockIdx.x;
    const auto share_of = [&](int dim, int64_t size) -> Range {
      if (g.dbias.stride[dim] == 0) return {0, size};
      // Divisions are of 32 bits: those of 64 are calls.
      const uint32_t count = static_cast<uint32_t>(size), at = index % count;
      index /= count;
      return {at, at + 1};
    };
    blocks = share_of(4, ceil_div(p.seqlen_k, keys));
    tiles = share_of(3, ceil_div(p.seqlen_q, queries));
    heads = share_of(2, p.heads_q);
    batch1 = share_of(1, p.batch1);
    batch0 = share_of(0, p.batch0);
    seq = {};
  }
};

template <typename TypeT, int kDim, DbiasTile kTile>
struct DbiasConfig {
  using T = TypeT;
  static constexpr int kHeadDim = kDim, kThreads = 32 * kTile.warps;
  static constexpr int kQueries = kTile.queries(), kKeys = kTile.keys;

  struct Operands {
    SharedTile<T, kQueries, kHeadDim> query, dout;
    SharedTile<T, kKeys, kHeadDim> key, value;
  };
  struct Shared {
    DbiasPlan plan;
    union {
      Operands operands;
      alignas(16) float total[kQueries][kKeys];  // at the end
    };
  };
};

FA_DEVICE void store_bias(void* data, DType dtype, int64_t index, float x) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[index] = x; return;
    case DType::kFloat64: static_cast<double*>(data)[index] = static_cast<double>(x); return;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(ptx::pack(x, 0.0f, bf16{}));
      return;
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(ptx::pack(x, 0.0f, f16{}));
      return;
  }
}

template <typename Config>
class FlashDbias {
  using T = typename Config::T;
  static constexpr int kThreads = Config::kThreads;
  static constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys, kN = kKeys / 8;
  using Scores = BackwardScores<false, true, 1, kN>;
  using Tile = Accumulator<1, kN>;

 public:
  FA_DEVICE FlashDbias(const BackwardParams& given, typename Config::Shared& memory)
      : params(given),
        g(given.gradient),
        p(given.gradient.forward),
        shared(memory),
        plan(memory.plan),
        seq(plan.seq),
        thread(static_cast<int>(threadIdx.x)),
        warp_row(thread / 32 * 16) {}

  FA_DEVICE void run() {
    if (thread == 0) shared.plan = DbiasPlan(g, kQueries, kKeys);
    ptx::sync_block();
    total.set_zero();
    for (int64_t b0 = plan.batch0.first; b0 < plan.batch0.last; ++b0) {
      for (int64_t b1 = plan.batch1.first; b1 < plan.batch1.last; ++b1) {
        ptx::sync_block();
        if (thread == 0) shared.plan.seq = sequence_at(p, b0 * p.batch1 + b1);
        ptx::sync_block();
        for (int64_t head = plan.heads.first; head < plan.heads.last; ++head) add_head(head);
      }
    }
    store();
  }

 private:
  FA_DEVICE void add_head(int64_t head) {
    for (int64_t tile = plan.tiles.first; tile < plan.tiles.last; ++tile) {
      const int64_t first_query = tile * kQueries;
      const Range rows = {first_query, min_of(first_query + kQueries, seq.len_q)};
      if (is_empty(rows)) return;
      const Range seen = keys_seen_by_any(p, seq, rows);
      for (int64_t block = plan.blocks.first; block < plan.blocks.last; ++block) {
        const Range keys = {block * kKeys, (block + 1) * kKeys};
        if (!is_empty(intersect(seen, keys))) add_tile(head, first_query, keys.first);
      }
    }
  }

  FA_DEVICE void add_tile(int64_t head, int64_t first_query, int64_t first_key) {
    load_operands(head, first_query, first_key);
    const int64_t origin = padded_origin(params, seq, head) + first_query + warp_row;
    const auto of_row = [&](const float* of_rows, int half) {
      return of_rows[origin + row_of(0, 2 * half)];
    };
    const float row_lse_of[2] = {of_row(params.row_lse, 0), of_row(params.row_lse, 1)};
    const float row_delta[2] = {of_row(params.delta, 0), of_row(params.delta, 1)};
    const auto row_lse = [&](int, int, int e) { return row_lse_of[e / 2]; };
    const auto delta = [&](int, int, int e) { return row_delta[e / 2]; };
    const ScorePlace<false> place = {params, p, seq, head, first_query + warp_row, first_key};
    Scores scores;
    scores.weights.set_zero();
    ptx::cp_async_wait<1>();
    ptx::sync_block();  // Q and K are there
    multiply_rows(scores.weights, shared.operands.query, warp_row, shared.operands.key, 0);
    scores.mask_tile(place);
    scores.template recompute_p<true>(params.unit, row_lse);
    scores.drop(place);
    Tile ds;
    ds.set_zero();
    ptx::cp_async_wait<0>();
    ptx::sync_block();  // dO and V are there
    multiply_rows(ds, shared.operands.dout, warp_row, shared.operands.value, 0);
    ptx::sync_block();  // all are used up
    scores.template to_ds<true>(ds, params.survivor, delta);
    total.for_each([&](int m, int n, int e, float& x) { x += ds.x[m][n][e]; });
  }

  FA_DEVICE void load_operands(int64_t head, int64_t first_query, int64_t first_key) {
    const QueryTile tile = {head, first_query, 1};
    const uint32_t group = static_cast<uint32_t>(p.heads_q) / static_cast<uint32_t>(p.heads_kv);
    const int64_t head_kv = static_cast<uint32_t>(head) / group;
    load_rows(shared.operands.query, params.query, QueryTileRows<T>(p.query, seq, tile, seq.len_q));
    load_keys(shared.operands.key, p.key, params.key, head_kv, first_key);
    ptx::cp_async_commit();
    load_rows(shared.operands.dout, params.dout, QueryTileRows<T>(g.dout, seq, tile, seq.len_q));
    load_keys(shared.operands.value, p.value, params.value, head_kv, first_key);
    ptx::cp_async_commit();
  }
  template <typename SharedRows, typename Rows>
  FA_DEVICE void load_rows(SharedRows& to, const ColumnLayout& layout, const Rows& rows) {
    load_tile<kThreads>(to, thread, layout, rows);
  }
  template <typename SharedRows>
  FA_DEVICE void load_keys(SharedRows& to, const ConstTensor& tensor, const ColumnLayout& layout,
                           int64_t head_kv, int64_t first_key) {
    const KeyRows<T> rows(p, tensor, seq, head_kv);
    load_tile<kThreads>(to, thread, layout,
                        KeyTileRows<T>{rows, first_key, {seq.first_seen, seq.len_k}});
  }

  // Sums of rows or columns that share an element of the bias go to the first of them.
  FA_DEVICE void store() {
    const bool has_rows = g.dbias.stride[3] != 0, has_columns = g.dbias.stride[4] != 0;
    total.for_each([&](int m, int n, int e, float& x) {
      ptx::store_shared(&shared.total[warp_row + row_of(m, e)][column_of(n, e)], x);
    });
    ptx::sync_block();
    if (!has_rows) {
      for (int c = thread; c < kKeys; c += kThreads) {
        float sum = 0.0f;
        for (int r = 0; r < kQueries; ++r) sum += ptx::load_shared(&shared.total[r][c]);
        ptx::store_shared(&shared.total[0][c], sum);
      }
      ptx::sync_block();
    }
    const int rows = has_rows ? kQueries : 1;
    if (!has_columns) {
      for (int r = thread; r < rows; r += kThreads) {
        float sum = 0.0f;
        for (int c = 0; c < kKeys; ++c) sum += ptx::load_shared(&shared.total[r][c]);
        ptx::store_shared(&shared.total[r][0], sum);  // which this thread stores, below
      }
    }
    const int columns = has_columns ? kKeys : 1;
    for (int n = thread; n < rows * columns; n += kThreads) store_element(n / columns, n % columns);
  }

  FA_DEVICE void store_element(int r, int c) {
    const int64_t (&stride)[5] = g.dbias.stride;
    const int64_t i = stride[3] == 0 ? 0 : plan.tiles.first * kQueries + r;
    const int64_t j = stride[4] == 0 ? 0 : plan.blocks.first * kKeys + c;
    if ((stride[3] != 0 && i >= p.seqlen_q) || (stride[4] != 0 && j >= p.seqlen_k)) return;
    const int64_t at = offset_of(stride, plan.batch0.first, plan.batch1.first, plan.heads.first) +
                       i * stride[3] + j * stride[4];
    store_bias(g.dbias.data, p.bias_dtype, at, ptx::load_shared(&shared.total[r][c]));
  }

  const BackwardParams& params;
  const AttentionGradParams& g;
  const AttentionParams& p;
  typename Config::Shared& shared;
  const DbiasPlan& plan;
  const Sequence& seq;
  const int thread, warp_row;
  Tile total;
};

template <typename Config>
FA_KERNEL(Config::kThreads, 1)
void flash_bwd_dbias_sm80(const __grid_constant__ BackwardParams params) {
  FlashDbias<Config>(params, *static_cast<typename Config::Shared*>(ptx::shared_memory())).run();
}

}  // namespace fastattn::cuda
