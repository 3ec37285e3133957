// Driver of rotary embedding: blocks of tokens, spread over threads.
#include "rowwise_kernels.h"
#include "workspace.h"

namespace fastattn::cpu {
namespace {

// The angles of a block of tokens, and a row of x and out, stay in the first-level cache.
constexpr size_t kAngleBytes = size_t{16} << 10;
constexpr int64_t kMostTokens = 64;

// Waking a thread takes longer than this many elements.
constexpr int64_t kSerialElements = 1 << 15;

}  // namespace

Status rope(const RopeParams& p, const Threads& threads) {
  const int64_t batch = rope_batch(p);
  int64_t columns = 0;
  for (int n = 0; n < p.num_operands; ++n) columns += p.operand[n].heads * p.operand[n].head_dim;
  if (batch == 0 || p.length == 0 || columns == 0) return Status::kOk;

  const size_t token_bytes = max_of<size_t>(rope_scratch_bytes(p, 1), 1);
  const int64_t most = static_cast<int64_t>(max_of<size_t>(kAngleBytes / token_bytes, 1));
  const int64_t tokens = min_of(min_of(most, kMostTokens), p.length);
  const int64_t blocks = ceil_div(p.length, tokens);
  const int64_t elements = batch * p.length * columns;
  const int64_t workers = elements < kSerialElements ? 1 : threads.count;

  const size_t scratch_bytes = round_up(static_cast<int64_t>(rope_scratch_bytes(p, tokens)), 64);
  const Workspace workspace(scratch_bytes * static_cast<size_t>(workers));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  const RopeKernels& kernels = rowwise_kernels(p.dtype).rope;
  for_each_item(threads, workers, batch * blocks, [&](int64_t item, int64_t worker) {
    const int64_t first = item % blocks * tokens;
    kernels.rotate_tokens(p, item / blocks, first, min_of(first + tokens, p.length),
                          workspace.data() + scratch_bytes * static_cast<size_t>(worker));
  });
  return Status::kOk;
}

}  // namespace fastattn::cpu
