// From products q.k to P and dS, the same for every kernel of the backward pass. A tile of scores
// lies either with its queries as rows, as in the forward pass, or transposed, with its keys as
// rows.
//
//   P = exp(S - lse);  dS = P * (D dP - delta);  D = keep / (1 - p) with dropout, else 1
//
// Hidden scores have P = 0 and dS = 0 exactly, whatever dP, delta and the slope of softcap hold.
#pragma once

#include <type_traits>

#include "backward_params.h"
#include "backward_tiles.h"
#include "mask.cuh"

namespace fastattn::cuda {

// Where the part of a tile of scores lies that a warp has.
template <bool kKeysAreRows>
struct ScorePlace {
  const BackwardParams& params;
  const AttentionParams& p;
  const Sequence& seq;
  int64_t head, first_row, first_column;

  FA_DEVICE int64_t query(int m, int n, int e) const {
    return kKeysAreRows ? first_column + column_of(n, e) : first_row + row_of(m, e);
  }
  FA_DEVICE int64_t key(int m, int n, int e) const {
    return kKeysAreRows ? first_row + row_of(m, e) : first_column + column_of(n, e);
  }
  // The columns that a row sees, or that see it.
  FA_DEVICE Columns seen(int row, int width) const {
    const int64_t at = first_row + row;
    if (at >= (kKeysAreRows ? seq.len_k : seq.len_q)) return {0, 0};
    const Range range =
        kKeysAreRows ? rows_seeing_any(p, seq, {at, at + 1}) : visible_keys(p, seq, at);
    return columns_of(range, first_column, width);
  }
};

// The sign of a weight says whether dropout has dropped it.
FA_DEVICE bool is_dropped(float weight) {
  return __float_as_uint(weight) >> 31 != 0;
}
FA_DEVICE float with_dropped(float weight, bool dropped) {
  const uint32_t magnitude = __float_as_uint(weight) & 0x7fffffffu;
  return __uint_as_float(magnitude | (dropped ? 0x80000000u : 0u));
}

// P and what else dS depends on, in the registers of a warp. kTerms: scores need ScoreTerms, or
// dropout.
template <bool kKeysAreRows, bool kTerms, int kM, int kN>
struct BackwardScores {
  using Tile = Accumulator<kM, kN>;
  struct None {};

  Tile weights;  // products q.k, then scores, then P, with the sign of with_dropped()
  [[no_unique_address]] std::conditional_t<kTerms, Tile, None> slopes;  // of softcap

  // What hides a key, and what is added to its score.
  FA_DEVICE void mask_tile(const ScorePlace<kKeysAreRows>& place) {
    if constexpr (kTerms) {
      apply_softcap(place.params);
      if (place.p.bias.data != nullptr) add_bias(place);
      if (place.p.alibi_slopes.data != nullptr) add_alibi(place);
      if (place.p.mask.data != nullptr) apply_mask(place);
    }
    hide_columns(weights, [&](int row) { return place.seen(row, 8 * kN); });
  }

  // `row_lse(m, n, e)`: of the query of an element. kMasked: some scores are hidden.
  template <bool kMasked, typename OfQuery>
  FA_DEVICE void recompute_p(float unit, const OfQuery& row_lse) {
    weights.for_each([&](int m, int n, int e, float& x) {
      const float lse = row_lse(m, n, e);
      const float weight = ptx::exp2(kTerms ? (x - lse) * unit : fmaf(x, unit, -lse));
      // A lse of NaN belongs to those who saw the NaN.
      x = kMasked && x == -infinity() ? 0.0f : weight;
    });
  }

  FA_DEVICE void drop(const ScorePlace<kKeysAreRows>& place) {
    if (place.p.dropout_p == 0) return;
    const Dropout dropout(place.p);
    const int64_t head = place.seq.index * place.p.heads_q + place.head;
    weights.for_each([&](int m, int n, int e, float& x) {
      x = with_dropped(x, dropout.drops(place.key(m, n, e), place.query(m, n, e), head));
    });
  }

  // dP -> dS.
  template <bool kMasked, typename OfQuery>
  FA_DEVICE void to_ds(Tile& dp, float survivor, const OfQuery& delta) const {
    dp.for_each([&](int m, int n, int e, float& x) {
      const float weight = weights.x[m][n][e];
      if constexpr (kTerms) x = is_dropped(weight) ? 0.0f : x * survivor;
      const float ds = fabsf(weight) * (x - delta(m, n, e));
      x = kMasked && weight == 0 ? 0.0f : ds;
    });
  }

  // From now on, dS of the products times scale.
  FA_DEVICE void through_softcap() {
    if constexpr (kTerms) {
      weights.for_each(
          [&](int m, int n, int e, float& x) { x = x == 0 ? x : x * slopes.x[m][n][e]; });
    }
  }

  // D P, the weights that the values had.
  FA_DEVICE Tile survivors(float survivor) const {
    Tile kept = weights;
    if constexpr (kTerms) {
      kept.for_each([&](int, int, int, float& x) { x = is_dropped(x) ? 0.0f : x * survivor; });
    }
    return kept;
  }

 private:
  // The slope of a hidden score may be anything.
  FA_DEVICE void apply_softcap(const BackwardParams& params) {
    const float softcap = static_cast<float>(params.gradient.forward.softcap);
    if (softcap == 0) {
      weights.for_each([&](int, int, int, float& x) { x *= params.scale; });
      slopes.for_each([](int, int, int, float& slope) { slope = 1.0f; });
      return;
    }
    weights.for_each([&](int m, int n, int e, float& x) {
      const float t = tanhf(x * params.inner_scale);
      x = softcap * t;
      slopes.x[m][n][e] = 1.0f - t * t;
    });
  }

  FA_DEVICE void add_bias(const ScorePlace<kKeysAreRows>& place) {
    for_each_seen(place, place.p.bias, [&](float& x, int64_t index) {
      const float b = load_bias(place.p.bias.data, place.p.bias_dtype, index);
      x = b == -infinity() ? b : x + b;
    });
  }

  FA_DEVICE void apply_mask(const ScorePlace<kKeysAreRows>& place) {
    const auto* mask = static_cast<const uint8_t*>(place.p.mask.data);
    for_each_seen(place, place.p.mask, [&](float& x, int64_t index) {
      if (mask[index] == 0) x = -infinity();
    });
  }

  FA_DEVICE void add_alibi(const ScorePlace<kKeysAreRows>& place) {
    const ConstTensor& t = place.p.alibi_slopes;
    const float slope = static_cast<const float*>(
        t.data)[offset_of(t.stride, place.seq.b0, place.seq.b1, place.head)];
    weights.for_each([&](int m, int n, int e, float& x) {
      const int64_t distance = place.key(m, n, e) - place.query(m, n, e) + place.seq.diagonal;
      x -= slope * fabsf(static_cast<float>(distance));
    });
  }

  // body(x, index): with that of its element of a tensor of scores, for those that have one.
  template <typename Body>
  FA_DEVICE void for_each_seen(const ScorePlace<kKeysAreRows>& place, const ConstTensor& t,
                               const Body& body) {
    const int64_t origin = offset_of(t.stride, place.seq.b0, place.seq.b1, place.head);
    weights.for_each([&](int m, int n, int e, float& x) {
      const int64_t i = place.query(m, n, e), j = place.key(m, n, e);
      if (i >= place.seq.len_q || j >= place.seq.len_k) return;
      body(x, origin + i * t.stride[3] + j * t.stride[4]);
    });
  }
};

// Of a query whose dO, and so whose delta, is not finite: the weights that it has are NaN, and
// become the gradients of the values that it sees.
template <int kM, int kN, typename OfQuery>
FA_DEVICE void spread_nonfinite(Accumulator<kM, kN>& weights, const OfQuery& delta) {
  weights.for_each(
      [&](int m, int n, int e, float& x) { x = x == 0 ? 0.0f : fmaf(0.0f, delta(m, n, e), x); });
}

// Infinities and NaN in this thread's share of a tile become 0, so that 0 times them is 0. By then
// the scores have met them: who saw them has NaN.
template <int kThreads, typename Tile>
FA_DEVICE void clear_nonfinite(Tile& tile, int thread) {
  using T = typename Tile::Element;
  for_each_chunk<kThreads, Tile>(thread, [&](int r, int index) {
    auto* at = reinterpret_cast<Chunk*>(tile.chunk(r, index));
    Chunk chunk = ptx::load_shared(at);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(T) == 4) {
        if (is_nonfinite(chunk.word[w], T{})) chunk.word[w] = 0;
      } else {
        chunk.word[w] &= ~nonfinite_mask<T>(chunk.word[w]);
      }
    }
    ptx::store_shared(at, chunk);
  });
}

}  // namespace fastattn::cuda
