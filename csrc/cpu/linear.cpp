// Driver of linear layers with few rows: outputs are spread over threads.
#include "rowwise_kernels.h"
#include "workspace.h"

namespace fastattn::cpu {
namespace {

// Waking a thread takes longer than reading this many weights.
constexpr int64_t kSerialElements = 1 << 16;
constexpr int64_t kLeastOutputs = 8;

// Outputs of an item, of which each worker gets several where rows of weights are contiguous. With
// contiguous columns it gets few: an item reads a part of every row, and long parts are faster.
int64_t outputs_of_item(const LinearParams& p, int64_t workers) {
  if (p.weight_stride[1] == 1) {
    const int64_t share = ceil_div(p.out_features, 4 * workers);
    return workers == 1 ? kLinearBlock
                        : max_of(kLeastOutputs, min_of(kLinearBlock, round_up(share, 8)));
  }
  const int64_t most = kLinearStripSums / p.rows / kLinearStripUnit * kLinearStripUnit;
  const int64_t items = ceil_div(p.out_features, most * workers) * workers;
  return round_up(ceil_div(p.out_features, items), kLinearStripUnit);
}

}  // namespace

Status linear(const LinearParams& p, const Threads& threads) {
  if (p.rows == 0 || p.out_features == 0) return Status::kOk;
  const LinearKernels& kernels = rowwise_kernels(p.dtype).linear;
  const Workspace workspace(kernels.scratch_bytes(p));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  kernels.stage(p, workspace.data());
  const int64_t workers = p.in_features * p.out_features < kSerialElements ? 1 : threads.count;
  const int64_t outputs = outputs_of_item(p, workers);
  for_each_item(threads, workers, ceil_div(p.out_features, outputs), [&](int64_t i, int64_t) {
    kernels.multiply(p, workspace.data(), i * outputs, min_of((i + 1) * outputs, p.out_features));
  });
  return Status::kOk;
}

}  // namespace fastattn::cpu
