// How tensors lie in memory, as far as kernels load and store them in different ways.
#pragma once

#include "forward_params.h"
#include "tiles.h"

namespace fastattn::cuda {

// The head_dim whose kernels take these tensors.
inline int head_dim_of(const AttentionParams& p) {
  const int64_t widest = max_of(p.head_dim, p.head_dim_v);
  for (const int head_dim : kHeadDims) {
    if (widest <= head_dim) return head_dim;
  }
  return 0;
}

// Whether columns are contiguous and every row begins at a multiple of `elements` of them.
// `sizes`: of the other dimensions; what is of size 1 is not stepped over.
inline bool is_aligned(const void* data, const int64_t (&stride)[5], const int64_t (&sizes)[4],
                       size_t element_bytes, int64_t elements) {
  bool aligned =
      stride[4] == 1 && reinterpret_cast<uintptr_t>(data) % (element_bytes * elements) == 0;
  for (int d = 0; d < 4; ++d) aligned &= sizes[d] <= 1 || stride[d] % elements == 0;
  return aligned;
}

template <typename View>
ColumnLayout column_layout(const View& tensor, const int64_t (&sizes)[4], size_t element_bytes,
                           int64_t columns) {
  const int64_t chunk = 16 / static_cast<int64_t>(element_bytes);
  return {static_cast<int32_t>(columns),
          is_aligned(tensor.data, tensor.stride, sizes, element_bytes, chunk), tensor.stride[4]};
}

// Of query, out, and their gradients. (Rows of packed sequences begin anywhere.)
template <typename View>
ColumnLayout query_layout(const AttentionParams& p, const View& tensor, int64_t columns) {
  return column_layout(tensor, {p.batch0, p.batch1, p.heads_q, max_of(p.seqlen_q, p.total_q)},
                       dtype_size(p.dtype), columns);
}

// Of key and value, or of a cache of them.
template <typename View>
ColumnLayout key_layout(const AttentionParams& p, const View& tensor, int64_t columns) {
  const bool int8 = is_int8(p.cache);
  constexpr int64_t kMany = 2;  // entries and rows of a cache: not to be known here
  const bool cached = has_row_table(p.cache) || p.cache.key_starts.data != nullptr;
  return column_layout(tensor,
                       {cached ? kMany : p.batch0, p.batch1, p.heads_kv,
                        cached ? kMany : max_of(p.seqlen_k, p.total_k)},
                       int8 ? 1 : dtype_size(p.dtype), columns);
}

// Whether two columns can be stored at once.
inline bool is_paired(const AttentionParams& p, const MutableTensor& tensor, int64_t columns) {
  const int64_t sizes[4] = {p.batch0, p.batch1, p.heads_q, max_of(p.seqlen_q, p.total_q)};
  return columns % 2 == 0 && is_aligned(tensor.data, tensor.stride, sizes, dtype_size(p.dtype), 2);
}

}  // namespace fastattn::cuda
