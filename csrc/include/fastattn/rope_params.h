// What the rotary embedding is told: one POD struct. Strides are in elements; no data means absent.
#pragma once

#include "params.h"

namespace fastattn {

constexpr int kRopeBatchDims = 6;  // leading dimensions of a tensor, at most

// int32 or int64 values of shape (*batch, length) or (*batch), nullable.
struct RopeIndices {
  const void* data;
  bool is_int64;
  int64_t batch_stride[kRopeBatchDims];
  int64_t stride;
};

// A tensor that is rotated. Strides of the dimensions (head, token, column).
struct RopeOperand {
  const void* x;  // (*batch, heads, length, head_dim)
  void* out;      // the same shape, overwritten; may be x itself
  int64_t heads, head_dim;
  int64_t x_batch_stride[kRopeBatchDims], out_batch_stride[kRopeBatchDims];
  int64_t x_stride[3], out_stride[3];
};

// Token i of batch entry b is rotated by row positions[b, i] + offsets[b] + offset of the tables;
// without positions i takes their place. Angle p turns the pair (x, y) into (x cos_p - y sin_p, y
// cos_p + x sin_p); pairs are (p, p + rotary_dim / 2), or (2 p, 2 p + 1) when interleaved. Columns
// from rotary_dim on are copied.
struct RopeParams {
  DType dtype;        // of every operand
  DType table_dtype;  // any, of cos and sin
  int num_operands;   // 1 or 2
  RopeOperand operand[2];

  int batch_dims;  // <= kRopeBatchDims
  int64_t batch_size[kRopeBatchDims];
  int64_t length, rotary_dim;

  const void *cos, *sin;  // (rows, rotary_dim / 2)
  int64_t table_rows;
  int64_t cos_stride[2], sin_stride[2];                                        // row, column
  int64_t cos_batch_stride[kRopeBatchDims], sin_batch_stride[kRopeBatchDims];  // 0: one for all

  RopeIndices positions;  // (*batch, length), nullable
  RopeIndices offsets;    // (*batch), nullable
  int64_t offset;
  bool interleaved;
  bool inverse;  // turn back: sin is negated
};

FA_INLINE int64_t rope_batch(const RopeParams& p) {
  int64_t batch = 1;
  for (int d = 0; d < p.batch_dims; ++d) batch *= p.batch_size[d];
  return batch;
}

// Offset of batch entry b, counted over all leading dimensions.
FA_INLINE int64_t rope_batch_offset(const RopeParams& p, const int64_t (&stride)[kRopeBatchDims],
                                    int64_t b) {
  int64_t offset = 0;
  for (int d = p.batch_dims - 1; d >= 0; --d) {
    offset += b % p.batch_size[d] * stride[d];
    b /= p.batch_size[d];
  }
  return offset;
}

// What is added to the position of every token of batch entry b.
FA_INLINE int64_t rope_offset(const RopeParams& p, int64_t b) {
  if (p.offsets.data == nullptr) return p.offset;
  const IndexArray array{p.offsets.data, p.offsets.is_int64};
  return p.offset + index_at(array, rope_batch_offset(p, p.offsets.batch_stride, b));
}

// The position of token i before that, where `first` is the offset of the batch entry.
FA_INLINE int64_t rope_position(const RopeParams& p, int64_t first, int64_t i) {
  if (p.positions.data == nullptr) return i;
  return index_at({p.positions.data, p.positions.is_int64}, first + i * p.positions.stride);
}

}  // namespace fastattn
