// The gradients of act(input + bias), that of the bias among them: the sum over all rows, in an
// order that the shape and the device alone decide.
#pragma once

#include "activation.cuh"

namespace fastattn::cuda {

// A block's sums, a row of them for each row that its threads have at once.
template <typename T>
constexpr size_t kBiasGradSharedBytes = sizeof(float) * kActivationThreads * kChunkColumns<T>;

// dinput of a thread's chunks, where it is wanted, and the sums over their rows.
template <Activation kKind, typename T, int kSteps>
FA_DEVICE void sum_chunks(const ActivationTask& task, const Chunks<T, kSteps>& mine,
                          const float (&bias)[kChunkColumns<T>], float (&sums)[kChunkColumns<T>]) {
  const ChunkView* const views[] = {&task.dinput, &task.input, &task.dout};
  int64_t at[kSteps][3];
  mine.locate(views, at);
  Chunk input[kSteps], dout[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    input[s] = load_view<T>(task.input, at[s][1], mine.there(s));
    dout[s] = load_view<T>(task.dout, at[s][2], mine.there(s));
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (mine.there(s) <= 0) continue;  // NaN in the bias would count for rows that are not there
    float x[kChunkColumns<T>], dx[kChunkColumns<T>];
    unpack<T>(input[s], x);
    unpack<T>(dout[s], dx);
#pragma unroll
    for (int i = 0; i < kChunkColumns<T>; ++i) {
      dx[i] *= slope_of<kKind, T>(x[i] + bias[i]).slope;
      sums[i] += dx[i];
    }
    if (task.dinput.data == nullptr) continue;
    store_view<T>(task.dinput, at[s][0], mine.there(s), dx);
  }
}

template <typename T>
FA_KERNEL(kActivationThreads, kBiasBlocks)
void activation_bias_backward(const __grid_constant__ ActivationTask task) {
  using Mine = Chunks<T, kActivationSteps<2>>;
  const ActivationTile& tile = task.tile;
  const uint32_t lane = threadIdx.x & static_cast<uint32_t>(tile.lanes - 1);
  const uint32_t slice = divide(blockIdx.x, task.strips);
  const int64_t strip = blockIdx.x - slice * task.strips.value;
  const int64_t first = slice * task.slices.rows + (threadIdx.x >> tile.log2_lanes);
  const int64_t last = min_of((slice + 1) * task.slices.rows, task.rows);
  const int64_t chunk = strip * tile.width + lane;
  float sums[kChunkColumns<T>] = {}, bias[kChunkColumns<T>];
  const Mine begin(task, first, last, chunk);
  load_bias(task, begin.column * task.bias.stride, begin.there(0), bias);
  with_kind(task.kind, [&]<Activation kKind>() {
    for (int64_t row = first; row < last; row += tile.rows) {
      sum_chunks<kKind>(task, Mine(task, row, last, chunk), bias, sums);
    }
  });
  float* shared = static_cast<float*>(ptx::shared_memory());
#pragma unroll
  for (int i = 0; i < kChunkColumns<T>; i += 4) {
    const float4 four = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
    ptx::store_shared(reinterpret_cast<float4*>(shared + threadIdx.x * kChunkColumns<T> + i), four);
  }
  ptx::sync_block();
  const int width = tile.lanes * kChunkColumns<T>;
  const int64_t first_column = strip * width, columns = task.columns - first_column;
  for (int column = static_cast<int>(threadIdx.x); column < min_of<int64_t>(width, columns);
       column += kActivationThreads) {
    float sum = 0.0f;
    for (int y = 0; y < tile.rows_at_once; ++y) {
      sum += ptx::load_shared(shared + y * width + column);
    }
    task.sums[slice * task.columns + first_column + column] = sum;
  }
}

}  // namespace fastattn::cuda
