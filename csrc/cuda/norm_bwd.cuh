// Norms, backward. A block goes through rows that are far apart, each read once and held in
// registers, and keeps the sums over them beside, also in registers: partial sums, which another
// kernel adds up in a fixed order (norm_sums.cuh).
//
//   load -> means of g and of g n -> gradients, and what the row adds to the sums
#pragma once

#include <type_traits>

#include "device.cuh"
#include "norm_row.cuh"

namespace fastattn::cuda {

template <typename T>
using PartialSum = std::conditional_t<sizeof(T) == 4, double, float>;

FA_DEVICE float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
FA_DEVICE double multiply_add(float a, float b, double c) {
  return fma(static_cast<double>(a), static_cast<double>(b), c);
}

// Runs that a thread holds of each tensor.
template <typename T, typename O>
constexpr int kBackwardRuns = sizeof(O) > sizeof(T) ? kWideHeldRuns : kHeldRuns;

// kHeld: runs of a row that a thread holds; 0: a row of any width, read again in every pass,
// without the sums over rows.
template <typename T, typename O, int kHeld, bool kHasBias>
class NormBackward {
  static constexpr int kColumns = kRunColumns<T>, kPart = kPartColumns;
  static constexpr int kRuns = kHeld > 0 ? kHeld : 1, kThreadColumns = kRuns * kColumns;
  using Column = std::conditional_t<(kHeld > 0), int, int64_t>;
  using Sum = PartialSum<T>;
  using InputRun = Run<T, kColumns>;
  struct RunPair {
    InputRun x;
    Run<O, kColumns> dy;
  };

 public:
  FA_DEVICE NormBackward(const NormBackwardParams& given, RowSum::Shared* memory)
      : params(given),
        g(given.gradient),
        p(given.gradient.forward),
        reduction(*memory, given.tile.row_threads),
        weight(memory + 1, 0),
        place(static_cast<int>(threadIdx.x)) {}

  FA_DEVICE void run() {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.y;
    for (int64_t first = begin; first < p.shape.rows; first += step) {
      // A thread without a row goes all the way with the first one, of which it takes no columns,
      // for the others' sake.
      const bool has_row = first + threadIdx.y < p.shape.rows;
      row = has_row ? first + threadIdx.y : 0;
      width = has_row ? static_cast<Column>(p.shape.width) : 0;
      find_inputs();
      load();
      if (first == begin) stage_weight();  // while the first row is on its way
      find_means();
      find_outputs();
      store_gradients();
    }
  }

  // The block's sums over its rows.
  FA_DEVICE void store_sums() const {
    auto* const memory = static_cast<Sum*>(weight.end());
    if (g.dweight != nullptr) store_sum(static_cast<Sum*>(params.sums.weight), dweight, memory);
    if constexpr (kHasBias) {
      if (g.dbias != nullptr) store_sum(static_cast<Sum*>(params.sums.bias), dbias, memory);
    }
  }

 private:
  FA_DEVICE Column column_of(int run) const {
    return (static_cast<Column>(run) * params.tile.row_threads + place) * kColumns;
  }
  FA_DEVICE int count_from(Column first) const {
    return static_cast<int>(min_of<Column>(width - first, kColumns));
  }

  // Where the row lies is asked twice, which takes less registers than to remember it.
  FA_DEVICE void find_inputs() {
    const int64_t* const strides[] = {p.input.stride, g.dnormalised.stride, p.statistics.stride};
    int64_t at[3];
    row_offsets(p.shape, row, strides, at);
    input = static_cast<const T*>(p.input.data) + at[0];
    dnormalised = static_cast<const O*>(g.dnormalised.data) + at[1];
    statistics = load_statistics(p.kind, static_cast<const float*>(p.statistics.data) + at[2]);
  }
  FA_DEVICE void find_outputs() {
    const int64_t* const strides[] = {g.dsummed.stride, g.dinput.stride, g.dresidual.stride,
                                      p.row_stride};
    int64_t at[4];
    row_offsets(p.shape, row, strides, at);
    dsummed = static_cast<const T*>(g.dsummed.data) + at[0];
    dinput = static_cast<T*>(g.dinput.data) + at[1];
    dresidual = static_cast<T*>(g.dresidual.data) + at[2];
    row_number = at[3];
  }

  FA_DEVICE RunPair load_pair(Column first) const {
    const int count = count_from(first);
    return {load_run<T, kColumns>(input + first * p.input.step, p.input.step, params.whole.input,
                                  count),
            load_run<O, kColumns>(dnormalised + first * g.dnormalised.step, g.dnormalised.step,
                                  params.whole.dnormalised, count)};
  }

  FA_DEVICE void load() {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int r = 0; r < kHeld; ++r) {
        if (column_of(r) < width) held[r] = load_pair(column_of(r));
      }
    }
  }

  // body(run, first, pair) for each run of this thread; `run` is known to the compiler, and 0 where
  // rows are not held.
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
        body(0, first, load_pair(first));
      }
    }
  }

  FA_DEVICE void load_weight(Column first, float (&w)[kPart]) const {
    const Column columns = static_cast<Column>(p.shape.width) - first;
    load_parameter(weight_of(p, params.whole), first,
                   static_cast<int>(min_of<Column>(columns, kPart)), w);
  }

  FA_DEVICE void stage_weight() const {
#pragma unroll
    for (int part = 0; part < kHeld * kColumns / kPart; ++part) {
      constexpr int kRunParts = kColumns / kPart;
      float w[kPart];
      load_weight(column_of(part / kRunParts) + part % kRunParts * kPart, w);
      weight.store(part, w);
    }
  }

  struct Part {
    float x[kPart], dy[kPart], w[kPart];
  };
  // Of the run's columns from c on.
  FA_DEVICE Part load_part(const RunPair& pair, int run, Column first, int c) const {
    Part part;
    if constexpr (kHeld > 0) {
      weight.load((run * kColumns + c) / kPart, part.w);
    } else {
      load_weight(first + c, part.w);
    }
    unpack(pair.x, part.x, c);
    unpack(pair.dy, part.dy, c);
    return part;
  }

  FA_DEVICE void add_products(const Part& part, int count, float& sum, float& product) const {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      if (i >= count) continue;
      const float gradient = part.dy[i] * part.w[i];
      sum += gradient;
      product = fmaf(gradient, statistics.normalise(part.x[i]), product);
    }
  }

  // dx = rstd g - offset - slope n
  FA_DEVICE void find_means() {
    float sum = 0.0f, product = 0.0f;
    for_each_run([&](int run, Column first, const RunPair& pair) {
      float of_run = 0.0f, product_of_run = 0.0f;
#pragma unroll
      for (int c = 0; c < kColumns; c += kPart) {
        const Part part = load_part(pair, run, first, c);
        // Whole parts, which nearly all are, without a question about each column.
        if (first + c + kPart <= width) {
          add_products(part, kPart, of_run, product_of_run);
        } else {
          add_products(part, count_from(first + c), of_run, product_of_run);
        }
      }
      sum += of_run;
      product += product_of_run;
    });
    double total[] = {sum, product};
    reduction.reduce(total);
    const double scale = statistics.rstd * params.inverse_width;
    offset = p.kind == NormKind::kLayer ? static_cast<float>(total[0] * scale) : 0.0f;
    slope = static_cast<float>(total[1] * scale);
  }

  FA_DEVICE void store_gradients() {
    for_each_run([&](int run, Column first, const RunPair& pair) {
      const int count = count_from(first);
      InputRun dx, dropped;
#pragma unroll
      for (int c = 0; c < kColumns; c += kPart) {
        float gradient[kPart];
        find_dx(load_part(pair, run, first, c), run * kColumns + c, gradient);
        if (g.dsummed.data != nullptr) add_dsummed(first + c, gradient);
        pack(gradient, dx, c);
        if (g.dinput.data == nullptr) continue;
        const RowDropout dropout = {Dropout(p), row_number};
        dropout.apply_to(first + c, gradient);
        pack(gradient, dropped, c);
      }
      if (g.dresidual.data != nullptr) {
        store_run(dresidual + first, params.whole.dresidual, count, dx);
      }
      if (g.dinput.data != nullptr) store_run(dinput + first, params.whole.dinput, count, dropped);
    });
  }

  // And what they add to the sums, of which `held_column` is the first one.
  FA_DEVICE void find_dx(const Part& part, int held_column, float (&dx)[kPart]) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const float n = statistics.normalise(part.x[i]);
      if constexpr (kHeld > 0) {
        Sum& sum = dweight[held_column + i];
        sum = multiply_add(part.dy[i], n, sum);
        if constexpr (kHasBias) dbias[held_column + i] += part.dy[i];
      }
      dx[i] = fmaf(-slope, n, fmaf(statistics.rstd, part.dy[i] * part.w[i], -offset));
    }
  }

  FA_DEVICE void add_dsummed(Column first, float (&dx)[kPart]) const {
    float more[kPart];
    unpack(load_run<T, kPart>(dsummed + first * g.dsummed.step, g.dsummed.step,
                              params.whole.dsummed, count_from(first)),
           more);
#pragma unroll
    for (int i = 0; i < kPart; ++i) dx[i] += more[i];
  }

  // To the block's row of `out`. Threads of several rows meet in shared memory.
  FA_DEVICE void store_sum(Sum* out, const Sum (&sum)[kThreadColumns], Sum* memory) const {
    const int columns = static_cast<int>(p.shape.width);
    const int stride = kThreadColumns * params.tile.row_threads;
    out += blockIdx.x * params.sums.stride;
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = static_cast<int>(column_of(r)) + c;
        if (params.tile.rows > 1) {
          ptx::store_shared(memory + threadIdx.y * stride + column, sum[r * kColumns + c]);
        } else if (column < columns) {
          out[column] = sum[r * kColumns + c];
        }
      }
    }
    if (params.tile.rows == 1) return;
    ptx::sync_block();
    const int thread = static_cast<int>(threadIdx.y) * params.tile.row_threads + place;
    for (int column = thread; column < columns; column += kRowBlockThreads) {
      Sum total = 0;
      for (int row = 0; row < params.tile.rows; ++row) {
        total += ptx::load_shared(memory + row * stride + column);
      }
      out[column] = total;
    }
    ptx::sync_block();  // the memory is free again
  }

  const NormBackwardParams& params;
  const NormGradParams& g;
  const NormParams& p;
  RowSum reduction;
  const StagedParameter<kHeld * kColumns / kPart> weight;
  const int place;  // of this thread, among those of its row
  int64_t row;
  Column width;
  const T *input, *dsummed;
  const O* dnormalised;
  T *dinput, *dresidual;
  RowStatistics statistics;
  float offset, slope;
  int64_t row_number;
  RunPair held[kRuns];
  Sum dweight[kThreadColumns] = {}, dbias[kHasBias ? kThreadColumns : 1] = {};
};

// kHasBias: whether the gradient of a bias is wanted; of RMS norms it never is.
template <typename T, typename O, bool kHasBias>
FA_KERNEL(backward_threads(kHasBias), 1)
void norm_backward_kernel(const __grid_constant__ NormBackwardParams params) {
  auto* const shared = static_cast<RowSum::Shared*>(ptx::shared_memory());
  NormBackward<T, O, kBackwardRuns<T, O>, kHasBias> backward(params, shared);
  backward.run();
  backward.store_sums();
}

// For rows that a block cannot hold.
template <typename T, typename O>
FA_KERNEL(kWideRowThreads, kWideRowBlocks)
void norm_backward_of_wide_rows_kernel(const __grid_constant__ NormBackwardParams params) {
  auto* const shared = static_cast<RowSum::Shared*>(ptx::shared_memory());
  NormBackward<T, O, 0, false>(params, shared).run();
}

template <typename T, typename O>
cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  const RowTile& tile = params.tile;
  auto* kernel = norm_backward_of_wide_rows_kernel<T, O>;
  if (tile.is_held) kernel = norm_backward_kernel<T, O, false>;
  if constexpr (sizeof(O) == sizeof(T)) {  // else it is the one of kRmsLlama
    if (tile.is_held && params.gradient.dbias != nullptr) {
      kernel = norm_backward_kernel<T, O, true>;
    }
  }
  return launch_blocks(kernel, params.blocks, dim3(tile.row_threads, tile.rows),
                       params.shared_bytes, stream, params);
}

}  // namespace fastattn::cuda
