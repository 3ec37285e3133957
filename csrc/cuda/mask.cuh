// From products q.k to the scores that softmax sees: what hides a key, and what is added to it.
// The backward pass takes the same steps in backward_scores.cuh, where it needs their slopes.
#pragma once

#include "philox.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {

// Some columns of a tile.
struct Columns {
  int first, last;
};

FA_DEVICE Columns columns_of(Range range, int64_t origin, int width) {
  return {static_cast<int>(clamp_of(range.first - origin, 0, width)),
          static_cast<int>(clamp_of(range.last - origin, 0, width))};
}

// Hides the columns of each row that are not among visible(row).
template <int kM, int kN, typename VisibleColumns>
FA_DEVICE void hide_columns(Accumulator<kM, kN>& scores, const VisibleColumns& visible) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Columns seen = visible(row_of(m, 2 * half));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = column_of(n, e);
          if (c < seen.first || c >= seen.last) scores.x[m][n][2 * half + e] = -infinity();
        }
      }
    }
  }
}

FA_DEVICE float load_bias(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[index];
    case DType::kBFloat16: return ptx::to_float(static_cast<const bf16*>(data)[index]);
    case DType::kFloat16: return ptx::to_float(static_cast<const f16*>(data)[index]);
    case DType::kFloat64: return static_cast<float>(static_cast<const double*>(data)[index]);
  }
  return 0.0f;
}

// What shapes the scores of one query besides its position: softcap, bias, ALiBi, mask. Softmax
// runs on the result with unit log2(e); without terms it runs on the products with unit
// scale * log2(e).
struct ScoreTerms {
  const AttentionParams& p;
  const Sequence& seq;
  float scale, inner_scale, softcap;

  FA_DEVICE ScoreTerms(const AttentionParams& params, const Sequence& sequence)
      : p(params),
        seq(sequence),
        scale(static_cast<float>(params.scale)),
        inner_scale(params.softcap != 0 ? static_cast<float>(params.scale / params.softcap) : 0.0f),
        softcap(static_cast<float>(params.softcap)) {}

  // The score of key j, in place of its product with query i of a head.
  FA_DEVICE float score(float product, int64_t head, int64_t i, int64_t j) const {
    float x = softcap != 0 ? softcap * tanhf(product * inner_scale) : product * scale;
    if (p.bias.data != nullptr) {
      const float b = load_bias(p.bias.data, p.bias_dtype, index(p.bias, head, i, j));
      x = b == -infinity() ? b : x + b;
    }
    if (p.alibi_slopes.data != nullptr) {
      const float distance = static_cast<float>(j - i + seq.diagonal);
      x -= alibi_slope(head) * fabsf(distance);
    }
    if (p.mask.data != nullptr) {
      const bool seen = static_cast<const uint8_t*>(p.mask.data)[index(p.mask, head, i, j)] != 0;
      x = seen ? x : -infinity();
    }
    return x;
  }

 private:
  FA_DEVICE int64_t index(const ConstTensor& t, int64_t head, int64_t i, int64_t j) const {
    return offset_of(t.stride, seq.b0, seq.b1, head) + i * t.stride[3] +
           (seq.first_column + j) * t.stride[4];
  }
  FA_DEVICE float alibi_slope(int64_t head) const {
    return static_cast<const float*>(
        p.alibi_slopes.data)[offset_of(p.alibi_slopes.stride, seq.b0, seq.b1, head)];
  }
};

}  // namespace fastattn::cuda
