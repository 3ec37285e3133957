// What the activations are told: one POD struct. Strides are in elements; no data means absent.
#pragma once

#include "params.h"

namespace fastattn {

enum class Activation : int32_t { kGelu, kGeluTanh, kSilu, kRelu };
constexpr int kNumActivations = 4;

constexpr int kActivationDims = 8;  // that cannot be merged, besides the columns

// A tensor over rows (of outer dimensions, the last one fastest) and columns; stride 0 where it is
// broadcast.
struct ActivationView {
  void* data;
  int64_t outer_stride[kActivationDims];
  int64_t stride;  // of the columns
};

// out = act(input), act(input + bias) or act(input) * up, element by element. Backward, where dout
// is given: dinput, dup and dbias instead, from dout and the inputs alone.
struct ActivationParams {
  DType dtype;       // of everything but bias and dbias
  DType bias_dtype;  // any
  Activation kind;
  int outer_dims;  // <= kActivationDims
  int64_t outer_size[kActivationDims];
  int64_t columns;

  ActivationView input;  // the gate, where up is given
  ActivationView up;     // nullable, and then bias is absent
  ActivationView bias;   // bias_dtype, nullable
  ActivationView out;    // overwritten

  ActivationView dout;
  ActivationView dinput;  // overwritten; nullable where dbias is given
  ActivationView dup;     // overwritten; beside up
  void* dbias;            // (columns), contiguous, bias_dtype, overwritten; nullable
};

FA_INLINE int64_t activation_rows(const ActivationParams& p) {
  int64_t rows = 1;
  for (int d = 0; d < p.outer_dims; ++d) rows *= p.outer_size[d];
  return rows;
}

FA_INLINE int64_t activation_row_offset(const ActivationParams& p, const ActivationView& view,
                                        int64_t row) {
  int64_t offset = 0;
  for (int d = p.outer_dims - 1; d > 0; --d) {
    offset += row % p.outer_size[d] * view.outer_stride[d];
    row /= p.outer_size[d];
  }
  return p.outer_dims > 0 ? offset + row * view.outer_stride[0] : 0;
}

}  // namespace fastattn
