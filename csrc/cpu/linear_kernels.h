// The functions of linear layers with few rows that a level offers for one dtype.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

// Outputs of a call where rows of weights are contiguous: their sums, a vec each, stay in the
// first-level cache.
constexpr int64_t kLinearBlock = 64;

// Outputs of a call where columns are, times rows of x; and what an item is a multiple of, so that
// each row of weights begins with a whole cache line.
constexpr int64_t kLinearStripSums = 1024 * kLinearRows;
constexpr int64_t kLinearStripUnit = 64;

// x is read from a copy in reals, as `stage` makes it.
struct LinearKernels {
  size_t (*scratch_bytes)(const LinearParams& p);
  void (*stage)(const LinearParams& p, void* scratch);
  // Outputs [first, last) of all rows: at most kLinearBlock of them with contiguous rows of
  // weights, at most kLinearStripSums / p.rows with contiguous columns.
  void (*multiply)(const LinearParams& p, const void* scratch, int64_t first, int64_t last);
};

}  // namespace fastattn::cpu
