// Driver of the activations: blocks of rows and columns, spread over threads.
#include "rowwise_kernels.h"
#include "workspace.h"

namespace fastattn::cpu {
namespace {

// A block of this many elements is worth handing out; a call with fewer stays in its thread, for
// waking another one takes longer.
constexpr int64_t kBlockElements = 1 << 14;

struct Blocks {
  int64_t rows, columns;            // of a block
  int64_t row_count, column_count;  // how many blocks

  Blocks(const ActivationParams& p, int64_t most_columns, int64_t least_rows)
      : columns(min_of(p.columns, most_columns)) {
    const int64_t all_rows = activation_rows(p);
    rows = min_of(all_rows, max_of(least_rows, ceil_div(kBlockElements, columns)));
    row_count = ceil_div(all_rows, rows);
    column_count = ceil_div(p.columns, columns);
  }
  int64_t count() const {
    return row_count * column_count;
  }
  ActivationBlock at(const ActivationParams& p, int64_t index) const {
    const int64_t row = index / column_count * rows, column = index % column_count * columns;
    return {row, min_of(row + rows, activation_rows(p)), column,
            min_of(column + columns, p.columns)};
  }
};

bool is_empty(const ActivationParams& p) {
  return p.columns == 0 || activation_rows(p) == 0;
}

}  // namespace

Status activation_forward(const ActivationParams& p, const Threads& threads) {
  if (is_empty(p)) return Status::kOk;
  const ActivationKernels& kernels = rowwise_kernels(p.dtype).activation;
  const Blocks blocks(p, kBlockElements, 1);
  for_each_item(threads, threads.count, blocks.count(),
                [&](int64_t i, int64_t) { kernels.forward(p, blocks.at(p, i)); });
  return Status::kOk;
}

Status activation_backward(const ActivationParams& p, const Threads& threads) {
  const ActivationKernels& kernels = rowwise_kernels(p.dtype).activation;
  const size_t real = p.dtype == DType::kFloat64 ? 8 : 4;
  if (p.dbias == nullptr) {
    if (is_empty(p)) return Status::kOk;
    const Blocks blocks(p, kBlockElements, 1);
    for_each_item(threads, threads.count, blocks.count(),
                  [&](int64_t i, int64_t) { kernels.backward(p, blocks.at(p, i), nullptr); });
    return Status::kOk;
  }
  // Each slice of rows has sums of its own. The slices depend on the shape alone, and are added in
  // order: the bits of dbias do not depend on threads.
  constexpr int64_t kSliceRows = 64, kMostSlices = 256;
  if (p.columns == 0) return Status::kOk;
  if (is_empty(p)) {
    kernels.add_slices(p, nullptr, 0, 0, p.columns);
    return Status::kOk;
  }
  const Blocks blocks(p, kActivationChunk,
                      max_of(kSliceRows, ceil_div(activation_rows(p), kMostSlices)));
  const Workspace workspace(static_cast<size_t>(blocks.row_count * p.columns) * real);
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  const int64_t elements = activation_rows(p) * p.columns;
  const int64_t workers = elements <= kBlockElements ? 1 : threads.count;
  for_each_item(threads, workers, blocks.count(), [&](int64_t i, int64_t) {
    const ActivationBlock block = blocks.at(p, i);
    const int64_t sums = i / blocks.column_count * p.columns + block.column;
    kernels.backward(p, block, workspace.data() + static_cast<size_t>(sums) * real);
  });
  for_each_item(threads, workers, blocks.column_count, [&](int64_t i, int64_t) {
    kernels.add_slices(p, workspace.data(), blocks.row_count, i * blocks.columns,
                       min_of((i + 1) * blocks.columns, p.columns));
  });
  return Status::kOk;
}

}  // namespace fastattn::cpu
