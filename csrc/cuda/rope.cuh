// Rotary embedding. A thread has two chunks of a token's columns, those that make pairs, in all
// heads of a group: it reads their angles once, and asks for the chunks of several heads at a time.
#pragma once

#include "division.cuh"
#include "rope_kernels.h"
#include "rotary.cuh"

namespace fastattn::cuda {

template <typename T>
class Rope {
  static constexpr int kColumns = 16 / sizeof(T);

 public:
  FA_DEVICE explicit Rope(const RopeTask& of) : task(of), p(of.params) {
    const uint32_t tile = divide(blockIdx.x, task.groups);
    group = static_cast<int64_t>(blockIdx.x - tile * task.groups.value);
    const int64_t index = static_cast<int64_t>(tile) * kRopeThreads + threadIdx.x;
    const Quotient at = divide(index, task.units);
    token = at.quotient, unit = at.remainder;
  }

  FA_DEVICE void run() {
    if (token >= task.tokens) return;
    const Quotient entry = divide(token, p.length);
    batch = entry.quotient, i = entry.remainder;
    rotates = unit < task.rotated_units;
    if (rotates) load_angles();
    int64_t first = group * task.heads_of_group, last = first + task.heads_of_group;
#pragma unroll 1
    for (int n = 0; n < p.num_operands; ++n) {
      const int64_t heads = p.operand[n].heads;
      set_columns(p.operand[n].head_dim);
      rotate_heads(n, max_of<int64_t>(first, 0), min_of(last, heads));
      first -= heads, last -= heads;
    }
  }

 private:
  // Offset of this token's batch entry.
  FA_DEVICE int64_t batch_offset(const int64_t (&stride)[kRopeBatchDims]) const {
    int64_t offset = 0, rest = batch;
#pragma unroll 1
    for (int d = p.batch_dims - 1; d > 0; --d) {
      const Quotient step = divide(rest, p.batch_size[d]);
      offset += step.remainder * stride[d];
      rest = step.quotient;
    }
    return offset + rest * stride[0];
  }

  // The row of the tables, or none: the host cannot know of it.
  FA_DEVICE int64_t table_row() const {
    uint64_t row = static_cast<uint64_t>(p.offset);
    if (p.offsets.data != nullptr) {
      row += static_cast<uint64_t>(
          index_at({p.offsets.data, p.offsets.is_int64}, batch_offset(p.offsets.batch_stride)));
    }
    row += static_cast<uint64_t>(
        p.positions.data == nullptr
            ? i
            : index_at({p.positions.data, p.positions.is_int64},
                       batch_offset(p.positions.batch_stride) + i * p.positions.stride));
    return row < static_cast<uint64_t>(p.table_rows) ? static_cast<int64_t>(row) : -1;
  }

  FA_DEVICE void load_angles() {
    const int64_t row = table_row(), first = unit * kColumns;
    const int there = static_cast<int>(min_of<int64_t>(p.rotary_dim / 2 - first, kColumns));
    if (row < 0) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) cos[k] = sin[k] = __uint_as_float(0x7fc00000u);
      return;
    }
    const int64_t cos_at = batch_offset(p.cos_batch_stride) + row * p.cos_stride[0];
    const int64_t sin_at = batch_offset(p.sin_batch_stride) + row * p.sin_stride[0];
    with_dtype(p.table_dtype, [&]<typename C>() {
      load_floats(static_cast<const C*>(p.cos) + cos_at + first * p.cos_stride[1],
                  {there, task.chunked.cos, p.cos_stride[1]}, cos);
      load_floats(static_cast<const C*>(p.sin) + sin_at + first * p.sin_stride[1],
                  {there, task.chunked.sin, p.sin_stride[1]}, sin);
    });
#pragma unroll
    for (int k = 0; k < kColumns; ++k) sin[k] = p.inverse ? -sin[k] : sin[k];
  }

  // Which two chunks: their first columns, and how many are there.
  FA_DEVICE void set_columns(int64_t head_dim) {
    const int64_t half = p.rotary_dim / 2, pair = unit * kColumns;
    int64_t end = p.rotary_dim;
    if (!rotates) {
      column[0] = p.rotary_dim + 2 * (unit - task.rotated_units) * kColumns;
      column[1] = column[0] + kColumns;
      end = head_dim;
    } else if (p.interleaved) {
      column[0] = 2 * pair;
      column[1] = column[0] + kColumns;
    } else {
      column[0] = pair;
      column[1] = half + pair;
    }
    const bool apart = rotates && !p.interleaved;
    there[0] = static_cast<int>(min_of<int64_t>((apart ? half : end) - column[0], kColumns));
    there[1] = static_cast<int>(min_of<int64_t>(end - column[1], kColumns));
    is_aligned[0] = rotates || task.chunked.rest;
    is_aligned[1] = rotates ? p.interleaved || task.chunked.halves : task.chunked.rest;
  }

  FA_DEVICE ColumnLayout layout(int chunk, bool is_chunked, int64_t stride) const {
    return {there[chunk], is_chunked && is_aligned[chunk], stride};
  }

  FA_DEVICE void rotate_heads(int n, int64_t first, int64_t last) const {
    const RopeOperand& operand = p.operand[n];
    const T* x = static_cast<const T*>(operand.x) + batch_offset(operand.x_batch_stride) +
                 i * operand.x_stride[1];
    T* out = static_cast<T*>(operand.out) + batch_offset(operand.out_batch_stride) +
             i * operand.out_stride[1];
#pragma unroll 1
    for (int64_t head = first; head < last; head += kRopeHeads) {
      Chunk chunk[kRopeHeads][2];
#pragma unroll
      for (int h = 0; h < kRopeHeads; ++h) {
        if (head + h >= last) continue;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          chunk[h][k] =
              load_chunk(x + (head + h) * operand.x_stride[0] + column[k] * operand.x_stride[2],
                         layout(k, task.chunked.x[n], operand.x_stride[2]), 0);
        }
      }
#pragma unroll
      for (int h = 0; h < kRopeHeads; ++h) {
        if (head + h >= last) continue;
        if (rotates) rotate_chunks<T>(chunk[h][0], chunk[h][1], cos, sin, p.interleaved);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          store_chunk(out + (head + h) * operand.out_stride[0] + column[k] * operand.out_stride[2],
                      layout(k, task.chunked.out[n], operand.out_stride[2]), 0, chunk[h][k]);
        }
      }
    }
  }

  const RopeTask& task;
  const RopeParams& p;
  int64_t group, token, unit;
  int64_t batch, i;  // the token is the i-th of a batch entry
  bool rotates;      // else the columns are copied
  float cos[kColumns], sin[kColumns];
  int64_t column[2];
  int there[2];
  bool is_aligned[2];
};

template <typename T>
FA_KERNEL(kRopeThreads, kRopeBlocks)
void rope(const __grid_constant__ RopeTask task) {
  Rope<T>(task).run();
}

}  // namespace fastattn::cuda
