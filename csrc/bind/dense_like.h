// Results of work on elements: dense, their memory in the order of an input's.
#pragma once

#include "tensor_args.h"

namespace fastattn::bind {

inline bool is_contiguous(const Tensor& x) {
  const Sizes sizes = x.sizes(), strides = x.strides();
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != stride) return false;
    stride *= max_of<int64_t>(sizes[d], 1);
  }
  return true;
}

// An uninitialised tensor of x's shape and dtype. Its memory order is that which torch's own
// elementwise ops give: a dense x keeps its strides, and a slice or a broadcast one keeps the order
// of its dimensions.
inline Tensor empty_dense_like(const Tensor& x) {
  if (is_contiguous(x)) return empty_contiguous(x.sizes(), dtype_code(x), x);
  return torch::stable::empty_like(x);
}

}  // namespace fastattn::bind
