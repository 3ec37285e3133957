// The functions of norms that a level offers for one dtype. "real" is float, or double for float64.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

// The rows [first, last) of a slice, and what its thread may write beside the results.
struct NormSlice {
  int64_t first, last;
  const void* weight;  // (width) reals
  const void* bias;    // (width) reals, read for kLayer
  bool stream;         // results go past the cache: nothing reads them before they would leave it
  void* scratch;       // forward_scratch_bytes or backward_scratch_bytes, aligned to 64
};

struct NormKernels {
  // out[i] = addend + source[i] as reals; source has any dtype.
  void (*widen)(DType dtype, const void* source, double addend, int64_t n, void* out);
  void (*fill)(double value, int64_t n, void* out);  // n reals

  size_t (*forward_scratch_bytes)(const NormParams&);
  void (*forward)(const NormParams&, const NormSlice&);
  void (*forward_wide)(const NormParams&, const NormSlice&);  // kRmsLlama; normalised is float32

  size_t (*backward_scratch_bytes)(const NormGradParams&);
  // dweight_sum and dbias_sum: (width) reals, overwritten with the sums over the slice, nullable.
  void (*backward)(const NormGradParams&, const NormSlice&, void* dweight_sum, void* dbias_sum);
  void (*backward_wide)(const NormGradParams&, const NormSlice&, void* dweight_sum,
                        void* dbias_sum);

  // out[c] = sum over slices, in their order, of sums[slice * stride + c], for the columns
  // [first, last); sums are reals, out has any dtype.
  void (*add_slices)(const void* sums, int64_t slices, int64_t stride, int64_t first, int64_t last,
                     DType dtype, void* out);
};

}  // namespace fastattn::cpu
