// Norms, forward: a row is read once, held in registers while its statistics are found, and written
// once. A block goes through rows that are far apart.
//
//   load (and add the residual) -> mean -> variance of the deviations from it -> normalise
#pragma once

#include <type_traits>

#include "device.cuh"
#include "norm_row.cuh"

namespace fastattn::cuda {

// kHeld: runs of a row that a thread holds; 0: a row of any width, read again in every pass.
template <typename T, typename O, int kHeld>
class NormForward {
  static constexpr int kColumns = kRunColumns<T>, kPart = kPartColumns;
  static constexpr int kThreadParts = kHeld * kColumns / kPart;
  using Column = std::conditional_t<(kHeld > 0), int, int64_t>;
  using InputRun = Run<T, kColumns>;

 public:
  FA_DEVICE NormForward(const NormForwardParams& given, RowSum::Shared* memory)
      : params(given),
        p(given.norm),
        sums(*memory, given.tile.row_threads),
        weight(memory + 1, 0),
        bias(memory + 1, 1),
        place(static_cast<int>(threadIdx.x)) {}

  FA_DEVICE void run() {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.y;
#pragma unroll 1
    for (int64_t first = begin; first < p.shape.rows; first += step) {
      row = first + threadIdx.y;
      // A thread without a row goes all the way with one of no columns, for the others' sake.
      width = row < p.shape.rows ? static_cast<Column>(p.shape.width) : 0;
      find_inputs();
      load();
      if (first == begin) stage_parameters();  // while the first row is on its way
      const RowStatistics s = find_statistics();
      find_outputs();
      if (width > 0 && place == 0 && p.statistics.data != nullptr) {
        store_statistics(p.kind, s, statistics);
      }
      normalise(s);
    }
  }

 private:
  // Where the row lies is asked twice, which takes less registers than to remember it.
  FA_DEVICE void find_inputs() {
    const int64_t* const strides[] = {p.input.stride, p.residual.stride, p.summed.stride,
                                      p.row_stride};
    int64_t offset[4];
    row_offsets(p.shape, row, strides, offset);
    input = static_cast<const T*>(p.input.data) + offset[0];
    residual = static_cast<const T*>(p.residual.data) + offset[1];
    summed = static_cast<T*>(p.summed.data) + offset[2];
    row_number = offset[3];
  }
  FA_DEVICE void find_outputs() {
    const int64_t* const strides[] = {p.normalised.stride, p.statistics.stride};
    int64_t offset[2];
    row_offsets(p.shape, row, strides, offset);
    normalised = static_cast<O*>(p.normalised.data) + offset[0];
    statistics = static_cast<float*>(p.statistics.data) + offset[1];
  }

  FA_DEVICE Column column_of(int run) const {
    return (static_cast<Column>(run) * params.tile.row_threads + place) * kColumns;
  }
  FA_DEVICE int count_from(Column first) const {
    return static_cast<int>(min_of<Column>(width - first, kColumns));
  }

  FA_DEVICE InputRun load_input(Column first) const {
    return load_run<T, kColumns>(input + first * p.input.step, p.input.step, params.whole.input,
                                 count_from(first));
  }
  FA_DEVICE InputRun load_residual(Column first) const {
    return load_run<T, kColumns>(residual + first * p.residual.step, p.residual.step,
                                 params.whole.residual, count_from(first));
  }

  // residual + dropout(input), each rounded to T; stored, and returned.
  FA_DEVICE InputRun add(Column first, const InputRun& to, const InputRun& from) const {
    InputRun run;
#pragma unroll
    for (int c = 0; c < kColumns; c += kPart) {
      float x[kPart], sum[kPart];
      unpack(from, x, c);
      unpack(to, sum, c);
      if (p.dropout_p > 0) {
        const RowDropout dropout = {Dropout(p), row_number};
        dropout.apply_to(first + c, x);
        unpack(pack<T>(x), x);
      }
#pragma unroll
      for (int i = 0; i < kPart; ++i) sum[i] += x[i];
      pack(sum, run, c);
    }
    store_run(summed + first, params.whole.summed, count_from(first), run);
    return run;
  }

  FA_DEVICE void load() {
    const bool has_residual = p.residual.data != nullptr;
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int r = 0; r < kHeld; ++r) {
        if (column_of(r) < width) held[r] = load_input(column_of(r));
      }
      if (!has_residual) return;
      // Two loads before a store, which the compiler must take for one to the same place: four
      // would cost too many registers.
#pragma unroll
      for (int r = 0; r < kHeld; r += 2) {
        InputRun other[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (column_of(r + i) < width) other[i] = load_residual(column_of(r + i));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (column_of(r + i) >= width) continue;
          held[r + i] = add(column_of(r + i), other[i], held[r + i]);
        }
      }
    } else if (has_residual) {
#pragma unroll 1
      for (Column first = column_of(0); first < width; first += column_of(1) - column_of(0)) {
        add(first, load_residual(first), load_input(first));
      }
    }
  }

  FA_DEVICE void load_parameters(Column first, float (&w)[kPart], float (&b)[kPart]) const {
    const int count =
        static_cast<int>(min_of<Column>(static_cast<Column>(p.shape.width) - first, kPart));
    load_parameter(weight_of(p, params.whole), first, count, w);
    load_parameter(bias_of(p, params.whole), first, count, b);
  }

  FA_DEVICE void stage_parameters() const {
#pragma unroll
    for (int part = 0; part < kThreadParts; ++part) {
      constexpr int kRunParts = kColumns / kPart;
      float w[kPart], b[kPart];
      load_parameters(column_of(part / kRunParts) + part % kRunParts * kPart, w, b);
      weight.store(part, w);
      if (p.bias != nullptr) bias.store(part, b);
    }
  }

  // Of the run's columns from c on.
  FA_DEVICE void load_part(int run, Column first, int c, float (&w)[kPart],
                           float (&b)[kPart]) const {
    if constexpr (kHeld > 0) {
      const int part = (run * kColumns + c) / kPart;
      weight.load(part, w);
#pragma unroll
      for (int i = 0; i < kPart; ++i) b[i] = 0.0f;
      if (p.bias != nullptr) bias.load(part, b);
    } else {
      load_parameters(first + c, w, b);
    }
  }

  // body(run, first, columns) for each run of this thread, of what is normalised; `run` is known to
  // the compiler, and 0 where rows are not held.
  template <typename Body>
  FA_DEVICE void for_each_run(const Body& body) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int r = 0; r < kHeld; ++r) {
        if (column_of(r) < width) body(r, column_of(r), held[r]);
      }
    } else {
#pragma unroll 1
      for (Column first = column_of(0); first < width; first += column_of(1) - column_of(0)) {
        if (p.residual.data == nullptr) {
          body(0, first, load_input(first));
        } else {  // what this thread has stored itself
          body(0, first,
               load_run<T, kColumns>(summed + first, 1, params.whole.summed, count_from(first)));
        }
      }
    }
  }

  FA_DEVICE float find_mean() {
    float sum = 0.0f;
    for_each_run([&](int, Column, const InputRun& run) {
      float x[kColumns], part = 0.0f;
      unpack(run, x);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) part += x[c];
      sum += part;
    });
    double total[] = {sum};
    sums.reduce(total);
    return static_cast<float>(total[0] * params.inverse_width);
  }

  static FA_DEVICE void add_deviations(const float (&x)[kColumns], float mean, int count,
                                       float& sum, float& squares) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (c >= count) continue;
      const float deviation = x[c] - mean;
      sum += deviation;
      squares = fmaf(deviation, deviation, squares);
    }
  }

  // The sum of the deviations tells what the rounded mean is off by: it corrects the variance, and
  // the row as `shift`. An RMS norm is the same with a mean of 0 that is not corrected.
  FA_DEVICE RowStatistics find_statistics() {
    const bool is_layer = p.kind == NormKind::kLayer;
    const float mean = is_layer ? find_mean() : 0.0f;
    float deviation = 0.0f, squares = 0.0f;
    for_each_run([&](int, Column first, const InputRun& run) {
      float x[kColumns], sum_part = 0.0f, squares_part = 0.0f;
      unpack(run, x);
      // Whole runs, which nearly all are, without a question about each column.
      if (first + kColumns <= width) {
        add_deviations(x, mean, kColumns, sum_part, squares_part);
      } else {
        add_deviations(x, mean, count_from(first), sum_part, squares_part);
      }
      deviation += sum_part;
      squares += squares_part;
    });
    if (!is_layer) {
      double total[] = {squares};
      sums.reduce(total);
      const float mean_square = static_cast<float>(total[0] * params.inverse_width);
      return {0.0f, 0.0f, 1.0f / sqrtf(mean_square + static_cast<float>(p.eps))};
    }
    double total[] = {deviation, squares};
    sums.reduce(total);
    const double error = total[0] * params.inverse_width;
    const double variance = max_of(total[1] * params.inverse_width - error * error, 0.0);
    const float rstd = 1.0f / sqrtf(static_cast<float>(variance + p.eps));
    return {mean, -static_cast<float>(error) * rstd, rstd};
  }

  FA_DEVICE void normalise(const RowStatistics& s) {
    for_each_run([&](int run_index, Column first, const InputRun& run) {
      Run<O, kColumns> out;
#pragma unroll
      for (int c = 0; c < kColumns; c += kPart) {
        float x[kPart], w[kPart], b[kPart];
        load_part(run_index, first, c, w, b);
        unpack(run, x, c);
#pragma unroll
        for (int i = 0; i < kPart; ++i) x[i] = s.normalise(x[i]);
        if (p.kind == NormKind::kRmsLlama) unpack(pack<T>(x), x);
#pragma unroll
        for (int i = 0; i < kPart; ++i) x[i] = fmaf(x[i], w[i], b[i]);
        pack(x, out, c);
      }
      store_run(normalised + first, params.whole.normalised, count_from(first), out);
    });
  }

  const NormForwardParams& params;
  const NormParams& p;
  RowSum sums;
  const StagedParameter<kThreadParts> weight, bias;
  const int place;  // of this thread, among those of its row
  int64_t row;
  Column width;
  const T *input, *residual;
  T* summed;
  O* normalised;
  float* statistics;
  int64_t row_number;
  InputRun held[kHeld > 0 ? kHeld : 1];
};

template <typename T, typename O, int kHeld>
FA_KERNEL(kHeld > 0 ? kForwardThreads : kWideRowThreads, kHeld > 0 ? 1 : kWideRowBlocks)
void norm_forward_kernel(const __grid_constant__ NormForwardParams params) {
  NormForward<T, O, kHeld>(params, static_cast<RowSum::Shared*>(ptx::shared_memory())).run();
}

template <typename T, typename O>
cudaError_t launch_norm_forward(const NormForwardParams& params, cudaStream_t stream) {
  const RowTile& tile = params.tile;
  const auto kernel =
      tile.is_held ? norm_forward_kernel<T, O, kHeldRuns> : norm_forward_kernel<T, O, 0>;
  return launch_blocks(kernel, params.blocks, dim3(tile.row_threads, tile.rows),
                       params.shared_bytes, stream, params);
}

}  // namespace fastattn::cuda
