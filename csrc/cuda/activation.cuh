// Activations, with a bias or gated, and their gradients: each tensor is read and written once, in
// chunks of 16 bytes, several of which a thread asks for before it waits for the first.
#pragma once

#include "activation_kernels.h"
#include "activation_math.cuh"
#include "chunk.cuh"
#include "division.cuh"

namespace fastattn::cuda {

// What is computed besides act(x).
enum class Form { kPlain, kBias, kGated };

template <typename T>
constexpr int kChunkColumns = 16 / sizeof(T);

// The chunks of a thread: kSteps of them, from a row and a column on, above last_row.
template <typename T, int kSteps>
struct Chunks {
  const ActivationTask& task;
  int64_t row, column;
  int columns_left, rows_left;  // from there on, as far as an int counts
  int column_step, row_step;    // one of them is 0

  FA_DEVICE Chunks(const ActivationTask& of, int64_t first_row, int64_t last_row, int64_t chunk)
      : task(of), row(first_row), column(chunk * kChunkColumns<T>) {
    columns_left = static_cast<int>(min_of<int64_t>(task.columns - column, INT32_MAX));
    rows_left = static_cast<int>(min_of<int64_t>(last_row - row, INT32_MAX));
    column_step = task.tile.along ? kActivationThreads * kChunkColumns<T> : 0;
    row_step = task.tile.along ? 0 : task.tile.rows_at_once;
  }

  // Columns of a step's chunk that are there; none: <= 0.
  FA_DEVICE int there(int step) const {
    return step * row_step < rows_left ? min_of(columns_left - step * column_step, kChunkColumns<T>)
                                       : 0;
  }

  // Where they lie in each of some views.
  template <int kViews>
  FA_DEVICE void locate(const ChunkView* const (&views)[kViews],
                        int64_t (&at)[kSteps][kViews]) const {
    locate_row(row, views, at[0]);
#pragma unroll
    for (int s = 1; s < kSteps; ++s) {
#pragma unroll
      for (int v = 0; v < kViews; ++v) at[s][v] = at[s - 1][v] + views[v]->step;
    }
    if (row_step == 0 || task.outer_dims <= 1) return;
#pragma unroll
    for (int s = 1; s < kSteps; ++s) {  // rows at distances that differ
      locate_row(min_of(row + s * row_step, task.rows - 1), views, at[s]);
    }
  }

 private:
  template <int kViews>
  FA_DEVICE void locate_row(int64_t index, const ChunkView* const (&views)[kViews],
                            int64_t (&at)[kViews]) const {
#pragma unroll
    for (int v = 0; v < kViews; ++v) at[v] = column * views[v]->stride;
#pragma unroll 1
    for (int d = task.outer_dims - 1; d > 0; --d) {
      const Quotient step = divide(index, task.outer_size[d]);
#pragma unroll
      for (int v = 0; v < kViews; ++v) at[v] += step.remainder * views[v]->outer_stride[d];
      index = step.quotient;
    }
#pragma unroll
    for (int v = 0; v < kViews; ++v) at[v] += index * views[v]->outer_stride[0];
  }
};

// Those of the kernels without sums.
template <typename T, int kSteps>
FA_DEVICE Chunks<T, kSteps> chunks_of_thread(const ActivationTask& task) {
  const ActivationTile& tile = task.tile;
  const uint32_t lanes = static_cast<uint32_t>(tile.lanes), lane = threadIdx.x & (lanes - 1);
  const uint32_t group = divide(blockIdx.x, task.strips);
  const uint32_t strip = blockIdx.x - group * task.strips.value;
  const int64_t row = static_cast<int64_t>(group) * tile.rows + (threadIdx.x >> tile.log2_lanes);
  return {task, row, task.rows, static_cast<int64_t>(strip) * tile.width + lane};
}

template <typename T>
FA_DEVICE Chunk load_view(const ChunkView& view, int64_t at, int there) {
  return load_chunk(static_cast<const T*>(view.data) + at, {there, view.is_chunked, view.stride},
                    0);
}

template <typename T>
FA_DEVICE void store_view(const ChunkView& view, int64_t at, int there,
                          const float (&x)[kChunkColumns<T>]) {
  store_chunk(static_cast<T*>(view.data) + at, {there, view.is_chunked, view.stride}, 0,
              pack_chunk<T>(x));
}

template <int kCount>
FA_DEVICE void load_bias(const ActivationTask& task, int64_t at, int there, float (&x)[kCount]) {
  const ChunkView& view = task.bias;
  with_dtype(task.bias_dtype, [&]<typename B>() {
    load_floats(static_cast<const B*>(view.data) + at, {there, view.is_chunked, view.stride}, x);
  });
}

template <int kCount>
FA_DEVICE void add_bias(const ActivationTask& task, int64_t at, int there, float (&x)[kCount]) {
  float bias[kCount];
  load_bias(task, at, there, bias);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] += bias[i];
}

template <typename T, Form kForm>
FA_KERNEL(kActivationThreads, kForm == Form::kBias ? kBiasBlocks : kActivationBlocks)
void activation_forward(const __grid_constant__ ActivationTask task) {
  constexpr int kSteps = kActivationSteps < kForm == Form::kGated ? 2 : 1 > ;
  const ChunkView* const views[] = {&task.out, &task.input,
                                    kForm == Form::kBias ? &task.bias : &task.up};
  const Chunks<T, kSteps> mine = chunks_of_thread<T, kSteps>(task);
  int64_t at[kSteps][3];
  mine.locate(views, at);
  int there[kSteps];
  Chunk input[kSteps], up[kSteps];
  float x[kSteps][kChunkColumns<T>];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    there[s] = mine.there(s);
    input[s] = load_view<T>(task.input, at[s][1], there[s]);
    if (kForm == Form::kGated) up[s] = load_view<T>(task.up, at[s][2], there[s]);
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    unpack<T>(input[s], x[s]);
    if constexpr (kForm == Form::kBias) add_bias(task, at[s][2], there[s], x[s]);
  }
  with_kind(task.kind, [&]<Activation kKind>() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      activate<kKind, T>(x[s]);
      if constexpr (kForm == Form::kGated) {
        float second[kChunkColumns<T>];
        unpack<T>(up[s], second);
#pragma unroll
        for (int i = 0; i < kChunkColumns<T>; ++i) x[s][i] *= second[i];
      }
      store_view<T>(task.out, at[s][0], there[s], x[s]);
    }
  });
}

// dx = dout * act'(x), and of gated ones dup = dout * act(x).
template <typename T, Form kForm>
FA_KERNEL(kActivationThreads, kForm == Form::kBias ? kBiasBlocks : kActivationBlocks)
void activation_backward(const __grid_constant__ ActivationTask task) {
  constexpr int kSteps = kActivationSteps < kForm == Form::kGated ? 3 : 2 > ;
  const ChunkView* const views[] = {&task.dinput, &task.dup, &task.input, &task.dout,
                                    kForm == Form::kBias ? &task.bias : &task.up};
  const Chunks<T, kSteps> mine = chunks_of_thread<T, kSteps>(task);
  int64_t at[kSteps][5];
  mine.locate(views, at);
  int there[kSteps];
  Chunk input[kSteps], dout[kSteps], up[kSteps];
  float x[kSteps][kChunkColumns<T>];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    there[s] = mine.there(s);
    input[s] = load_view<T>(task.input, at[s][2], there[s]);
    dout[s] = load_view<T>(task.dout, at[s][3], there[s]);
    if (kForm == Form::kGated) up[s] = load_view<T>(task.up, at[s][4], there[s]);
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    unpack<T>(input[s], x[s]);
    if constexpr (kForm == Form::kBias) add_bias(task, at[s][4], there[s], x[s]);
  }
  with_kind(task.kind, [&]<Activation kKind>() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      float dx[kChunkColumns<T>];
      [[maybe_unused]] float second[kChunkColumns<T>], dsecond[kChunkColumns<T>];
      unpack<T>(dout[s], dx);
      if constexpr (kForm == Form::kGated) unpack<T>(up[s], second);
#pragma unroll
      for (int i = 0; i < kChunkColumns<T>; ++i) {
        const Slope act = slope_of<kKind, T>(x[s][i]);
        if constexpr (kForm == Form::kGated) {
          dsecond[i] = dx[i] * act.value;
          dx[i] *= second[i];
        }
        dx[i] *= act.slope;
      }
      store_view<T>(task.dinput, at[s][0], there[s], dx);
      if constexpr (kForm == Form::kGated) {
        store_view<T>(task.dup, at[s][1], there[s], dsecond);
      }
    }
  });
}

}  // namespace fastattn::cuda
