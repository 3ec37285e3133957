#include "attention_maps.h"

#include <numeric>

namespace fastattn::cuda {
namespace {

// A dimension of a tensor in memory, in elements.
struct Dimension {
  int64_t size, stride;
};

bool is_expanded(const ConstTensor& tensor, const int64_t (&sizes)[4]) {
  bool expanded = false;
  for (int d = 0; d < 4; ++d) expanded |= sizes[d] > 1 && tensor.stride[d] == 0;
  return expanded;
}

constexpr int kBoxColumns = 64;  // 128 bytes, what the swizzle allows

// `dimensions` after the columns; the box has `box` of the first two.
cudaError_t encode(TensorMap* map, const AttentionParams& p, const void* data, int64_t columns,
                   const Dimension (&dimensions)[4], const int (&box)[2]) {
  TensorBox tensor = {};
  tensor.dtype = p.dtype;
  tensor.rank = 5;
  tensor.data = data;
  tensor.sizes[0] = columns;
  tensor.box[0] = kBoxColumns;
  for (int d = 0; d < 4; ++d) {
    tensor.sizes[d + 1] = dimensions[d].size;
    tensor.strides[d] = dimensions[d].stride * static_cast<int64_t>(dtype_size(p.dtype));
    tensor.box[d + 1] = d < 2 ? box[d] : 1;
  }
  tensor.swizzled = true;
  return encode_tensor_map(map, tensor);
}

Dimension batch0_of(const AttentionParams& p, const IndexArray& cu_seqlens, int64_t stride) {
  return cu_seqlens.data != nullptr ? Dimension{1, 0} : Dimension{p.batch0, stride};
}

int64_t queries_of(const AttentionParams& p) {
  return p.cu_seqlens_q.data != nullptr ? p.total_q : p.seqlen_q;
}

struct KeyDimensions {
  Dimension batch0, rows;
};

KeyDimensions key_dimensions(const AttentionParams& p, const ConstTensor& tensor) {
  const int64_t (&s)[5] = tensor.stride;
  if (has_row_table(p.cache)) return {{p.cache.entries, s[0]}, {rows_of_entry(p.cache), s[3]}};
  const int64_t rows = p.cu_seqlens_k.data != nullptr ? p.total_k : p.seqlen_k;
  return {batch0_of(p, p.cu_seqlens_k, s[0]), {rows, s[3]}};
}

}  // namespace

const char* sm90_build_obstacle(const DeviceLimits& limits) {
  if (limits.arch != 90) return "the GPU is not of compute capability 9.0";
#ifndef FASTATTN_WITH_SM90
  return "this build has no 90a in FASTATTN_CUDA_ARCHS";
#else
  return nullptr;
#endif
}

bool takes_queries(const AttentionParams& p, const ConstTensor& tensor, int64_t columns) {
  const int64_t batch0 = batch0_of(p, p.cu_seqlens_q, tensor.stride[0]).size;
  return query_layout(p, tensor, columns).is_chunked &&
         !is_expanded(tensor, {batch0, p.batch1, p.heads_q, queries_of(p)});
}

bool takes_keys(const AttentionParams& p, const ConstTensor& tensor, int64_t columns) {
  const KeyDimensions key = key_dimensions(p, tensor);
  return key_layout(p, tensor, columns).is_chunked &&
         !is_expanded(tensor, {key.batch0.size, p.batch1, p.heads_kv, key.rows.size});
}

int box_rows(const CacheView& cache, int keys) {
  return has_row_table(cache) ? static_cast<int>(std::gcd<int64_t>(rows_of_entry(cache), keys))
                              : keys;
}

cudaError_t encode_queries(TensorMap* map, const AttentionParams& p, const ConstTensor& tensor,
                           int64_t columns, int pack, int rows) {
  const int64_t (&s)[5] = tensor.stride;
  return encode(map, p, tensor.data, columns,
                {{p.heads_q, s[2]},
                 {queries_of(p), s[3]},
                 {p.batch1, s[1]},
                 batch0_of(p, p.cu_seqlens_q, s[0])},
                {pack, rows / pack});
}

cudaError_t encode_keys(TensorMap* map, const AttentionParams& p, const ConstTensor& tensor,
                        int64_t columns, int rows) {
  const int64_t (&s)[5] = tensor.stride;
  const KeyDimensions key = key_dimensions(p, tensor);
  return encode(map, p, tensor.data, columns,
                {key.rows, {p.heads_kv, s[2]}, {p.batch1, s[1]}, key.batch0},
                {box_rows(p.cache, rows), 1});
}

}  // namespace fastattn::cuda
