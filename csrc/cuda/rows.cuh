// Rows of tensors with any strides, as the threads of a block share them: where a row begins, its
// columns in registers, and sums over it.
#pragma once

#include "fastattn/norm_params.h"
#include "ptx.cuh"

namespace fastattn::cuda {

// kCount adjacent columns of T, 32-bit words of them.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Run {
  static_assert(kCount * sizeof(T) % 4 == 0);
  uint32_t word[kCount * sizeof(T) / 4];
};

// Columns from `first` on, an even number of them.
template <typename T, int kCount, int kPart>
FA_DEVICE void unpack(const Run<T, kCount>& run, float (&x)[kPart], int first = 0) {
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const int c = first + i;
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(run.word[c]);
    } else {
      x[i] = ptx::to_float(T{static_cast<uint16_t>(run.word[c / 2] >> (c % 2 * 16))});
    }
  }
}

// The same back, rounded to T.
template <typename T, int kCount, int kPart>
FA_DEVICE void pack(const float (&x)[kPart], Run<T, kCount>& run, int first = 0) {
#pragma unroll
  for (int i = 0; i < kPart; i += 4 / sizeof(T)) {
    if constexpr (sizeof(T) == 4) {
      run.word[first + i] = __float_as_uint(x[i]);
    } else {
      run.word[(first + i) / 2] = ptx::pack(x[i], x[i + 1], T{});
    }
  }
}

template <typename T, int kCount>
FA_DEVICE Run<T, kCount> pack(const float (&x)[kCount]) {
  Run<T, kCount> run;
  pack(x, run);
  return run;
}

// `count` columns from p on, `step` elements apart, and zeros behind them. is_whole: all of them,
// adjacent and aligned as a Run is.
template <typename T, int kCount>
FA_DEVICE Run<T, kCount> load_run(const T* p, int64_t step, bool is_whole, int count) {
  if (is_whole) return *reinterpret_cast<const Run<T, kCount>*>(p);
  Run<T, kCount> run = {};
  // Step by step: products with `step` would be kept in registers from row to row.
#pragma unroll
  for (int c = 0; c < kCount; ++c, p += step) {
    if (c >= count) continue;
    if constexpr (sizeof(T) == 4) {
      run.word[c] = __float_as_uint(*p);
    } else {
      run.word[c / 2] |= static_cast<uint32_t>(p->bits) << (c % 2 * 16);
    }
  }
  return run;
}

// The first `count` of them to p and on.
template <typename T, int kCount>
FA_DEVICE void store_run(T* p, bool is_whole, int count, const Run<T, kCount>& run) {
  if (is_whole) {
    *reinterpret_cast<Run<T, kCount>*>(p) = run;
    return;
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    if (c >= count) continue;
    if constexpr (sizeof(T) == 4) {
      p[c] = __uint_as_float(run.word[c]);
    } else {
      p[c].bits = static_cast<uint16_t>(run.word[c / 2] >> (c % 2 * 16));
    }
  }
}

// A weight or bias: `width` adjacent elements, what each column has where there are none, and what
// is added to each where there are.
struct Parameter {
  const void* data;
  DType dtype;
  bool is_whole;
  float absent, addend;
};

template <typename W, int kCount>
FA_DEVICE void load_as_floats(const void* data, int64_t first, bool is_whole, int count,
                              float (&x)[kCount]) {
  const W* from = static_cast<const W*>(data) + first;
  if constexpr (sizeof(W) == 8) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) x[c] = c < count ? static_cast<float>(from[c]) : 0.0f;
  } else {
    unpack(load_run<W, kCount>(from, 1, is_whole, count), x);
  }
}

// `count` columns from `first` on.
template <int kCount>
FA_DEVICE void load_parameter(const Parameter& parameter, int64_t first, int count,
                              float (&x)[kCount]) {
  const void* data = parameter.data;
  const bool is_whole = parameter.is_whole;
  if (data == nullptr) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) x[c] = parameter.absent;
    return;
  }
  switch (parameter.dtype) {
    case DType::kFloat32: load_as_floats<float>(data, first, is_whole, count, x); break;
    case DType::kBFloat16: load_as_floats<bf16>(data, first, is_whole, count, x); break;
    case DType::kFloat16: load_as_floats<f16>(data, first, is_whole, count, x); break;
    case DType::kFloat64: load_as_floats<double>(data, first, is_whole, count, x); break;
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) x[c] += parameter.addend;
}

// Divides in 32 bits where both fit: a division of 64 is a call.
FA_DEVICE int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Where row number `row` begins in several tensors at once.
template <int kTensors>
FA_DEVICE void row_offsets(const RowShape& shape, int64_t row,
                           const int64_t* const (&stride)[kTensors], int64_t (&offset)[kTensors]) {
#pragma unroll
  for (int t = 0; t < kTensors; ++t) offset[t] = 0;
#pragma unroll 1
  for (int d = shape.dims - 1; d > 0; --d) {
    const int64_t outer = divide(row, shape.size[d]), index = row - outer * shape.size[d];
#pragma unroll
    for (int t = 0; t < kTensors; ++t) offset[t] += index * stride[t][d];
    row = outer;
  }
#pragma unroll
  for (int t = 0; t < kTensors; ++t) offset[t] += row * stride[t][0];
}

// Sums over the threads that share a row: a power of two of a warp's lanes, or all warps of the
// block. Every thread gets the same bits, and they depend on the number of threads alone.
class RowSum {
 public:
  static constexpr int kMostValues = 2, kMostWarps = 32;
  // Two of them: whoever is still reading one sum has all others ahead of the next but one.
  struct Shared {
    double value[2][kMostValues][kMostWarps];
  };

  FA_DEVICE RowSum(Shared& memory, int threads) : shared(memory), row_threads(threads) {}

  // For all threads of the block.
  template <int kValues>
  FA_DEVICE void reduce(double (&value)[kValues]) {
    reduce_lanes(value, min_of(row_threads, ptx::kWarpSize));
    if (row_threads <= ptx::kWarpSize) return;
    const int lane = ptx::lane_id(), warps = row_threads / ptx::kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / ptx::kWarpSize;
    auto& buffer = shared.value[turn];
    turn ^= 1;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (lane == 0) ptx::store_shared(&buffer[v][warp], value[v]);
    }
    ptx::sync_block();
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      value[v] = lane < warps ? ptx::load_shared(&buffer[v][lane]) : 0.0;
    }
    reduce_lanes(value, ptx::kWarpSize);
  }

 private:
  template <int kValues>
  static FA_DEVICE void reduce_lanes(double (&value)[kValues], int lanes) {
#pragma unroll 1
    for (int mask = 1; mask < lanes; mask *= 2) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) value[v] += ptx::shuffle_xor(value[v], mask);
    }
  }

  Shared& shared;
  const int row_threads;
  int turn = 0;
};

}  // namespace fastattn::cuda
