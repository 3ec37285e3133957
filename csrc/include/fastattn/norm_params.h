// What the norm kernels are told. Strides are in elements; no data means absent.
#pragma once

#include "params.h"

namespace fastattn {

// Leading dimensions of a tensor whose trailing ones are the row that is normalised.
constexpr int kRowDims = 8;

// Rows of `width` elements, numbered by `dims` leading dimensions (at least one), in the order in
// which they are visited.
struct RowShape {
  int dims;
  int64_t size[kRowDims];
  int64_t rows, width;
};

// Elements of a row are `step` apart.
struct ConstRows {
  const void* data;
  int64_t stride[kRowDims];
  int64_t step;
};

// Elements of a row are adjacent.
struct MutableRows {
  void* data;
  int64_t stride[kRowDims];
};

// n is the normalised row, in float (double for float64), before its weight. round() is to dtype.
enum class NormKind : int32_t {
  kLayer,     // round(n * weight + bias),  n = (x - mean) / sqrt(variance + eps)
  kRms,       // round(n * weight),         n = x / sqrt(mean of x^2 + eps), here and below
  kRmsLlama,  // round(n) * weight, in the promoted dtype of input and weight
  kRmsGemma,  // round(n * (1 + weight))
};

// What is kept of a row for the backward pass. The mean of a layer norm is mean - shift / rstd:
// what the first, rounded mean is off by is half an ulp of it, which may be much next to the
// deviations. n = (x - mean) * rstd + shift.
constexpr int64_t kLayerStatistics = 3;  // mean, shift, rstd
constexpr int64_t kRmsStatistics = 1;    // rstd

FA_INLINE int64_t statistics_of(NormKind kind) {
  return kind == NormKind::kLayer ? kLayerStatistics : kRmsStatistics;
}

// summed = residual + dropout(input), each rounded to dtype; normalised = norm(summed). Without a
// residual, normalised = norm(input). "real" is float, or double for float64.
struct NormParams {
  NormKind kind;
  DType dtype;                     // of input, residual and summed
  DType out_dtype;                 // of normalised: dtype, or a wider float32 for kRmsLlama
  DType weight_dtype, bias_dtype;  // any
  RowShape shape;

  ConstRows input;
  ConstRows residual;      // nullable
  MutableRows summed;      // overwritten; present where residual is
  MutableRows normalised;  // overwritten
  MutableRows statistics;  // rows of statistics_of(kind) reals, overwritten, nullable
  const void* weight;      // (width) adjacent, nullable: as if all ones (kRmsGemma: zeros)
  const void* bias;        // (width) adjacent, nullable; kLayer only
  double eps;

  // Element (row, column) of input is kept when word column % 4 of the Philox block with the
  // counter (column / 4, row, row >> 32, offset) is at least dropout_p * 2^32, and then scaled by
  // 1 / (1 - dropout_p). row is the number of the row in the input, whatever its strides:
  // the sum of index * row_stride.
  double dropout_p;  // in [0, 1]; 0 without a residual
  uint64_t philox_seed, philox_offset;
  IndexArray philox;  // as that of AttentionParams
  int64_t row_stride[kRowDims];
};

// With g = dnormalised * weight and n as above:
//   dresidual = rstd * (g - mean(g) - n * mean(g * n)) + dsummed       (no mean(g) for RMS norms)
//   dinput    = dresidual * keep / (1 - dropout_p)
//   dweight   = sum over rows of dnormalised * n,   dbias = sum over rows of dnormalised
// Gradients are overwritten; absent ones are not computed.
struct NormGradParams {
  NormParams forward;     // input: what was normalised, the sum where there was a residual;
                          // statistics as the forward pass wrote them (read only here)
  ConstRows dnormalised;  // out_dtype
  ConstRows dsummed;      // dtype, nullable
  MutableRows dresidual;  // dtype, nullable; without a residual: the gradient of the input
  MutableRows dinput;     // dtype, nullable; needed only where dropout_p > 0
  void* dweight;          // (width) weight_dtype, nullable
  void* dbias;            // (width) bias_dtype, nullable
};

}  // namespace fastattn
