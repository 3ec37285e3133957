// Driver of cache writes: tokens or heads are spread over threads.
#include "rowwise_kernels.h"
#include "workspace.h"

namespace fastattn::cpu {
namespace {

// Waking a thread takes longer than writing this many elements.
constexpr int64_t kSerialElements = 1 << 15;
constexpr int64_t kTokensPerItem = 16;

}  // namespace

Status kv_cache_update(const CacheUpdateParams& p, const Threads& threads) {
  const CacheKernels& kernels = rowwise_kernels(p.dtype).cache;
  const int64_t elements = p.num_tokens * p.heads_kv * (p.head_dim + p.head_dim_v);
  const int64_t workers = elements < kSerialElements ? 1 : threads.count;
  const size_t scratch_bytes = round_up(kernels.scratch_bytes(p), 64);
  const Workspace workspace(scratch_bytes * static_cast<size_t>(workers));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  const auto scratch_of = [&](int64_t worker) {
    return workspace.data() + scratch_bytes * static_cast<size_t>(worker);
  };
  if (p.distinct || workers == 1) {
    const int64_t items = ceil_div(p.num_tokens, kTokensPerItem);
    for_each_item(threads, workers, items, [&](int64_t i, int64_t worker) {
      const int64_t first = i * kTokensPerItem;
      const int64_t last = min_of(first + kTokensPerItem, p.num_tokens);
      kernels.write_tokens(p, first, last, 0, p.heads_kv, scratch_of(worker));
    });
  } else {  // one thread writes all tokens of a head: the last one to a place stays
    for_each_item(threads, workers, p.heads_kv, [&](int64_t head, int64_t worker) {
      kernels.write_tokens(p, 0, p.num_tokens, head, head + 1, scratch_of(worker));
    });
  }
  return Status::kOk;
}

}  // namespace fastattn::cpu
