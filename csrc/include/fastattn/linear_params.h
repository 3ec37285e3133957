// What a linear layer of few rows is told: one POD struct. Strides are in elements.
#pragma once

#include "params.h"

namespace fastattn {

// Up to this many rows the sums of four rows of weights fit AVX-512's registers, and weights are
// read about as fast as for one row. From there on the matrix units behind torch's product, which
// repacks the weights whatever the number of rows, are as fast.
constexpr int kLinearRows = 6;

// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n], summed in float32 and rounded once.
struct LinearParams {
  DType dtype;       // of x, weight and out: bfloat16 or float16
  DType bias_dtype;  // any
  int64_t rows;      // <= kLinearRows
  int64_t in_features, out_features;

  const void* x[kLinearRows];  // the rows, in_features elements each
  int64_t x_stride;            // from one of them to the next
  const void* weight;
  // Of the dimensions of weight, (out_features, in_features). One is 1: rows of weights are
  // contiguous (the second) or columns are (the first).
  int64_t weight_stride[2];
  const void* bias;  // (out_features), contiguous, nullable
  void* out;         // (rows, out_features), contiguous, overwritten
};

}  // namespace fastattn
