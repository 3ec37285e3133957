// The functions of activations that a level offers for one dtype.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

// Columns that are done at a time where there is a bias or a stride: their copies stay in the
// first-level cache.
constexpr int64_t kActivationChunk = 512;

// Rows [row, row_end), columns [column, column_end).
struct ActivationBlock {
  int64_t row, row_end, column, column_end;
};

struct ActivationKernels {
  void (*forward)(const ActivationParams& p, const ActivationBlock& block);
  // `sums`, nullable: reals, one for each column of the block, overwritten with the sums over its
  // rows of the gradient of input + bias.
  void (*backward)(const ActivationParams& p, const ActivationBlock& block, void* sums);
  // dbias of columns [first, last): the sums, over `slices` rows of p.columns reals.
  void (*add_slices)(const ActivationParams& p, const void* sums, int64_t slices, int64_t first,
                     int64_t last);
};

}  // namespace fastattn::cpu
