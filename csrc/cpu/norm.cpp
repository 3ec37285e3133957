// Drivers of norms: parameters in reals, and rows over threads.
#include <unistd.h>

#include <algorithm>

#include "rowwise_kernels.h"
#include "workspace.h"

namespace fastattn::cpu {
namespace {

size_t real_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

// Waking a thread takes longer than this much traffic: such calls stay in the calling thread.
constexpr double kSerialBytes = 1 << 17;

// What a thread takes at a time.
constexpr double kItemBytes = 1 << 18;

double bytes_of_rows(const NormParams& p, int tensors) {
  return static_cast<double>(p.shape.rows) * static_cast<double>(p.shape.width) *
         static_cast<double>(dtype_size(p.dtype)) * tensors;
}

size_t last_level_cache() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return static_cast<size_t>(bytes);
#endif
  return size_t{32} << 20;
}

// Where weight and bias lie as reals: in place, or in the workspace.
class Parameters {
 public:
  static size_t workspace_bytes(const NormParams& p) {
    return 2 * bytes_of_one(p);
  }

  Parameters(const NormParams& p, const NormKernels& kernels, char* workspace) {
    const double addend = p.kind == NormKind::kRmsGemma ? 1 : 0;
    weight = as_reals(p, kernels, p.weight, p.weight_dtype, addend, 1, workspace);
    if (p.kind == NormKind::kLayer) {
      workspace += bytes_of_one(p);
      bias = as_reals(p, kernels, p.bias, p.bias_dtype, 0, 0, workspace);
    }
  }

  const void* weight;
  const void* bias = nullptr;

 private:
  static size_t bytes_of_one(const NormParams& p) {
    return static_cast<size_t>(
        round_up(p.shape.width * static_cast<int64_t>(real_size(p.dtype)), 64));
  }
  static const void* as_reals(const NormParams& p, const NormKernels& kernels, const void* values,
                              DType dtype, double addend, double if_absent, char* workspace) {
    if (values == nullptr) {
      kernels.fill(if_absent, p.shape.width, workspace);
      return workspace;
    }
    const DType real = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    if (dtype == real && addend == 0) return values;
    kernels.widen(dtype, values, addend, p.shape.width, workspace);
    return workspace;
  }
};

int64_t item_count(double bytes, int64_t most) {
  return std::clamp<int64_t>(static_cast<int64_t>(bytes / kItemBytes), 1, most);
}

struct Rows {
  int64_t first, last;
};

Rows rows_of_item(int64_t rows, int64_t items, int64_t item) {
  const int64_t each = ceil_div(rows, items);
  return {min_of(item * each, rows), min_of((item + 1) * each, rows)};
}

// How the sums over rows are split: by the shape alone, so that they do not depend on threads.
constexpr int64_t kMostSlices = 64;
constexpr int64_t kLeastSliceRows = 32;

int64_t slices_of(const NormParams& p) {
  const int64_t by_bytes = item_count(bytes_of_rows(p, 3), kMostSlices);
  return std::clamp<int64_t>(p.shape.rows / kLeastSliceRows, 1, by_bytes);
}

}  // namespace

Status norm_forward(const NormParams& p, const Threads& threads) {
  const NormKernels& kernels = rowwise_kernels(p.dtype).norm;
  const bool has_residual = p.residual.data != nullptr;
  const double bytes = bytes_of_rows(p, has_residual ? 4 : 2);
  const int64_t workers = bytes < kSerialBytes ? 1 : threads.count;
  const size_t scratch_bytes = kernels.forward_scratch_bytes(p);
  const size_t parameter_bytes = Parameters::workspace_bytes(p);
  const Workspace workspace(parameter_bytes + scratch_bytes * static_cast<size_t>(workers));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  const Parameters parameters(p, kernels, workspace.data());
  char* scratch = workspace.data() + parameter_bytes;

  // Where the tensors of the call would drive each other from the cache anyway.
  const bool stream = bytes > 0.5 * static_cast<double>(last_level_cache());
  const auto run = p.out_dtype == p.dtype ? kernels.forward : kernels.forward_wide;
  const int64_t items = item_count(bytes, p.shape.rows);
  for_each_item(threads, workers, items, [&](int64_t item, int64_t worker) {
    const Rows rows = rows_of_item(p.shape.rows, items, item);
    if (rows.first >= rows.last) return;
    run(p, {rows.first, rows.last, parameters.weight, parameters.bias, stream,
            scratch + scratch_bytes * static_cast<size_t>(worker)});
  });
  return Status::kOk;
}

Status norm_backward(const NormGradParams& g, const Threads& threads) {
  const NormParams& p = g.forward;
  const NormKernels& kernels = rowwise_kernels(p.dtype).norm;
  const bool need_sums = g.dweight != nullptr || g.dbias != nullptr;
  const double bytes = bytes_of_rows(p, g.dsummed.data != nullptr ? 4 : 3);
  const int64_t workers = bytes < kSerialBytes ? 1 : threads.count;
  const int64_t items = need_sums ? slices_of(p) : item_count(bytes, p.shape.rows);

  // A slice has its sums of dweight and dbias side by side.
  const int64_t width = p.shape.width;
  const int64_t padded = round_up(width, 16);
  const size_t sum_bytes = static_cast<size_t>(padded) * real_size(p.dtype);
  const size_t all_sums = need_sums ? 2 * sum_bytes * static_cast<size_t>(items) : 0;
  const size_t scratch_bytes = kernels.backward_scratch_bytes(g);
  const size_t parameter_bytes = Parameters::workspace_bytes(p);
  const Workspace workspace(parameter_bytes + all_sums +
                            scratch_bytes * static_cast<size_t>(workers));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  const Parameters parameters(p, kernels, workspace.data());
  char* sums = workspace.data() + parameter_bytes;
  char* scratch = sums + all_sums;

  const auto run = p.out_dtype == p.dtype ? kernels.backward : kernels.backward_wide;
  for_each_item(threads, workers, items, [&](int64_t item, int64_t worker) {
    const Rows rows = rows_of_item(p.shape.rows, items, item);
    char* own = need_sums ? sums + 2 * sum_bytes * static_cast<size_t>(item) : nullptr;
    run(g,
        {rows.first, rows.last, parameters.weight, nullptr, false,
         scratch + scratch_bytes * static_cast<size_t>(worker)},
        own, need_sums ? own + sum_bytes : nullptr);
  });
  if (!need_sums) return Status::kOk;

  constexpr int64_t kColumns = 1024;
  const bool is_short = static_cast<double>(all_sums) < kSerialBytes;
  for_each_item(
      threads, is_short ? 1 : workers, ceil_div(width, kColumns), [&](int64_t item, int64_t) {
        const int64_t first = item * kColumns, last = min_of(first + kColumns, width);
        if (g.dweight != nullptr) {
          kernels.add_slices(sums, items, 2 * padded, first, last, p.weight_dtype, g.dweight);
        }
        if (g.dbias != nullptr) {
          kernels.add_slices(sums + sum_bytes, items, 2 * padded, first, last, p.bias_dtype,
                             g.dbias);
        }
      });
  return Status::kOk;
}

}  // namespace fastattn::cpu
