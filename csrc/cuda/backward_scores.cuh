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
      const ScoreTerms terms(place.p, place.seq);
      weights.for_each([&](int m, int n, int e, float& x) {
        const int64_t i = place.query(m, n, e), j = place.key(m, n, e);
        float slope = 1.0f;
        if (i < place.seq.len_q && j < place.seq.len_k) {
          x = terms.score(x, place.head, i, j, &slope);
        }
        slopes.x[m][n][e] = slope;
      });
    }
    hide_columns(weights, [&](int row) { return place.seen(row, 8 * kN); });
  }

  // `stats(m, n, e)`: those of the query of an element. kMasked: some scores are hidden.
  template <bool kMasked, typename Stats>
  FA_DEVICE void recompute_p(float unit, const Stats& stats) {
    weights.for_each([&](int m, int n, int e, float& x) {
      const float weight = ptx::exp2(fmaf(x, unit, -stats(m, n, e).lse2));
      // A lse of NaN belongs to those who saw the NaN.
      x = kMasked && x == -infinity() ? 0.0f : weight;
    });
  }

  FA_DEVICE void drop(const ScorePlace<kKeysAreRows>& place) {
    if (place.p.dropout_p == 0) return;
    const Dropout dropout(place.p);
    const int64_t head = place.seq.index * place.p.heads_q + place.head;
    weights.for_each([&](int m, int n, int e, float& x) {
      x = with_dropped(x, dropout.keep(place.key(m, n, e), place.query(m, n, e), head) == 0);
    });
  }

  // What dropout multiplies the weights by that it keeps.
  static FA_DEVICE float survivor_of(const AttentionParams& p) {
    return kTerms && p.dropout_p != 0 ? Dropout(p).survivor : 1.0f;
  }

  // dP -> dS.
  template <bool kMasked, typename Stats>
  FA_DEVICE void to_ds(Tile& dp, float survivor, const Stats& stats) const {
    dp.for_each([&](int m, int n, int e, float& x) {
      const float weight = weights.x[m][n][e], delta = stats(m, n, e).delta;
      if constexpr (kTerms) x = is_dropped(weight) ? 0.0f : x * survivor;
      const float ds = fabsf(weight) * (x - delta);
      x = kMasked && weight == 0 ? 0.0f : ds;
    });
  }

  // dS of the scores -> of the products times scale.
  FA_DEVICE void through_softcap(Tile& ds) const {
    if constexpr (kTerms) {
      ds.for_each(
          [&](int m, int n, int e, float& x) { x = x == 0 ? 0.0f : x * slopes.x[m][n][e]; });
    }
  }

  // P -> D P, the weights that the values had.
  FA_DEVICE void keep_survivors(float survivor) {
    if constexpr (kTerms) {
      weights.for_each([&](int, int, int, float& x) { x = is_dropped(x) ? 0.0f : x * survivor; });
    }
  }
};

// Softmax runs on the products with this unit where there are no terms.
template <bool kTerms>
FA_DEVICE float score_unit(const AttentionParams& p) {
  return kTerms ? kLog2e : static_cast<float>(p.scale) * kLog2e;
}

}  // namespace fastattn::cuda
