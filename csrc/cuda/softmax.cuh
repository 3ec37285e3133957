// Online softmax of a warp's rows (Milakov and Gimelshein, 2018), in powers of two: exponents are
// scores times `unit`, which holds log2(e).
#pragma once

#include "mma_tile.cuh"

namespace fastattn::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

FA_DEVICE float infinity() {
  return __uint_as_float(0x7f800000u);
}

// Over the four lanes that share a row.
FA_DEVICE float max_of_row(float x) {
  x = fmaxf(x, ptx::shuffle_xor(x, 1));
  return fmaxf(x, ptx::shuffle_xor(x, 2));
}
FA_DEVICE float sum_of_row(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

// What a row contributes to the result: out = output_scale * acc_o.
struct RowResult {
  float output_scale, lse;
};

// -inf: none.
FA_DEVICE float sink_of(const AttentionParams& p, int64_t head) {
  if (p.sink.data == nullptr) return -infinity();
  return static_cast<const float*>(p.sink.data)[head * p.sink.stride[2]];
}

// What the maximum of a row is kept as. The exponent of a weight is the difference between two
// numbers that may be as far from 0 as a bias is: an additive mask hides all keys of a query that
// is padding behind -1e38.
enum class Maximum {
  kExponent,  // in powers of two: one fused operation a weight; for scores of ordinary size
  kScore      // the score itself: exact however large it is, for one operation more
};

// A sink is one more key with this score and no value. A row that saw nothing gives nothing. (Its
// sum says so: the maximum does not know of scores that are NaN.)
template <Maximum kMaximum>
FA_DEVICE RowResult finalize_row(float row_max, float row_sum, float sink) {
  if (row_sum == 0) return {0.0f, -infinity()};
  constexpr bool kIsScore = kMaximum == Maximum::kScore;
  constexpr float kUnit = kIsScore ? kLog2e : 1.0f, kNatural = kIsScore ? 1.0f : kLn2;
  const float of_sink = kIsScore ? sink : sink * kLog2e, reference = fmaxf(row_max, of_sink);
  const float own = ptx::exp2((row_max - reference) * kUnit);
  const float total = fmaf(row_sum, own, ptx::exp2((of_sink - reference) * kUnit));
  return {own / total, fmaf(reference, kNatural, logf(total))};
}

// The running state of 16 kM rows. row_sum is this lane's part.
template <int kM, Maximum kMaximum>
struct SoftmaxState {
  static constexpr bool kIsScore = kMaximum == Maximum::kScore;
  float row_max[kM][2], row_sum[kM][2];

  FA_DEVICE void reset() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = -infinity();
        row_sum[m][half] = 0.0f;
      }
    }
  }

  // What sums so far are to be multiplied by, and whether that changes any of the warp's.
  struct Growth {
    float scale[kM][2];
    bool any;
  };

  // Raises the maxima to those of these scores. Hidden scores are -inf.
  template <int kN>
  FA_DEVICE Growth raise_max(const Accumulator<kM, kN>& scores, float unit) {
    Growth growth;
    bool has_grown = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = -infinity();
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          largest = fmaxf(largest, fmaxf(scores.x[m][n][2 * half], scores.x[m][n][2 * half + 1]));
        }
        const float before = row_max[m][half];
        row_max[m][half] = fmaxf(before, max_of_row(largest) * (kIsScore ? 1.0f : unit));
        growth.scale[m][half] = ptx::exp2((before - reference(m, half)) * (kIsScore ? unit : 1.0f));
        row_sum[m][half] *= growth.scale[m][half];
        has_grown |= row_max[m][half] != before;
      }
    }
    growth.any = ptx::any_in_warp(has_grown);
    return growth;
  }

  // Scores become weights 2^(unit (s - max)), which are added to the sums.
  template <int kN>
  FA_DEVICE void weigh(Accumulator<kM, kN>& scores, float unit) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float origin = reference(m, half);
        float sum = 0.0f;  // of the tile first: a long chain of additions would round too often
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            float& x = scores.x[m][n][e];
            x = ptx::exp2(kIsScore ? (x - origin) * unit : fmaf(x, unit, -origin));
            sum += x;
          }
        }
        row_sum[m][half] += sum;
      }
    }
  }

  // The sum of what earlier weights have given. After the first tiles maxima seldom grow: most
  // steps have nothing to rescale.
  template <int kOutTiles>
  static FA_DEVICE void rescale(Accumulator<kM, kOutTiles>& acc_o, const Growth& growth) {
    if (!growth.any) return;
    acc_o.for_each([&](int m, int, int e, float& x) { x *= growth.scale[m][e / 2]; });
  }

  // All three.
  template <int kN, int kOutTiles>
  FA_DEVICE void step(Accumulator<kM, kN>& scores, float unit, Accumulator<kM, kOutTiles>& acc_o) {
    const Growth growth = raise_max(scores, unit);
    rescale(acc_o, growth);
    weigh(scores, unit);
  }

 private:
  // Of a row that has seen nothing yet, all weights are to be 0 and not NaN.
  FA_DEVICE float reference(int m, int half) const {
    return row_max[m][half] == -infinity() ? 0.0f : row_max[m][half];
  }
};

}  // namespace fastattn::cuda
