// Norms, forward: a row is read once, held in registers while its statistics are found, and written
// once.
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
  using Column = std::conditional_t<(kHeld > 0), int, int64_t>;
  using InputRun = Run<T, kColumns>;

 public:
  FA_DEVICE NormForward(const NormForwardParams& given, RowSum::Shared& memory)
      : params(given),
        p(given.norm),
        sums(memory, given.tile.row_threads),
        place(static_cast<int>(threadIdx.x)),
        row(static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y),
        // A thread without a row goes all the way with one of no columns, for the others' sake.
        width(row < p.shape.rows ? static_cast<Column>(p.shape.width) : 0) {}

  FA_DEVICE void run() {
    find_inputs();
    load();
    const RowStatistics s = find_statistics();
    find_outputs();
    if (width > 0 && place == 0 && p.statistics.data != nullptr) {
      store_statistics(p.kind, s, statistics);
    }
    normalise(s);
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

  // body(first, run) for each run of this thread, of what is normalised.
  template <typename Body>
  FA_DEVICE void for_each_run(const Body& body) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int r = 0; r < kHeld; ++r) {
        if (column_of(r) < width) body(column_of(r), held[r]);
      }
    } else {
#pragma unroll 1
      for (Column first = column_of(0); first < width; first += column_of(1) - column_of(0)) {
        if (p.residual.data == nullptr) {
          body(first, load_input(first));
        } else {  // what this thread has stored itself
          body(first,
               load_run<T, kColumns>(summed + first, 1, params.whole.summed, count_from(first)));
        }
      }
    }
  }

  FA_DEVICE float find_mean() {
    float sum = 0.0f;
    for_each_run([&](Column, const InputRun& run) {
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

  // The sum of the deviations tells what the rounded mean is off by: it corrects the variance, and
  // the row as `shift`. An RMS norm is the same with a mean of 0 that is not corrected.
  FA_DEVICE RowStatistics find_statistics() {
    const bool is_layer = p.kind == NormKind::kLayer;
    const float mean = is_layer ? find_mean() : 0.0f;
    float deviation = 0.0f, squares = 0.0f;
    for_each_run([&](Column first, const InputRun& run) {
      float x[kColumns], part = 0.0f, squares_part = 0.0f;
      unpack(run, x);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (first + c >= width) continue;
        x[c] -= mean;
        part += x[c];
        squares_part = fmaf(x[c], x[c], squares_part);
      }
      deviation += part;
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
    const Parameter weight = weight_of(p, params.whole), bias = bias_of(p, params.whole);
    for_each_run([&](Column first, const InputRun& run) {
      Run<O, kColumns> out;
#pragma unroll
      for (int c = 0; c < kColumns; c += kPart) {
        float x[kPart], w[kPart], b[kPart];
        load_parameter(weight, first + c, count_from(first + c), w);
        load_parameter(bias, first + c, count_from(first + c), b);
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
  const int place;  // of this thread, among those of its row
  const int64_t row;
  const Column width;
  const T *input, *residual;
  T* summed;
  O* normalised;
  float* statistics;
  int64_t row_number;
  InputRun held[kHeld > 0 ? kHeld : 1];
};

template <typename T, typename O, int kHeld>
FA_KERNEL(kHeld > 0 ? kForwardThreads : kWideRowThreads, 1)
void norm_forward_kernel(const __grid_constant__ NormForwardParams params) {
  auto* shared = static_cast<RowSum::Shared*>(ptx::shared_memory());
  NormForward<T, O, kHeld>(params, *shared).run();
}

template <typename T, typename O>
cudaError_t launch_norm_forward(const NormForwardParams& params, cudaStream_t stream) {
  const RowTile& tile = params.tile;
  const int64_t blocks = ceil_div(params.norm.shape.rows, tile.rows);
  const auto kernel =
      tile.is_held ? norm_forward_kernel<T, O, kHeldRuns> : norm_forward_kernel<T, O, 0>;
  return launch_blocks(kernel, blocks, dim3(tile.row_threads, tile.rows), sizeof(RowSum::Shared),
                       stream, params);
}

}  // namespace fastattn::cuda
