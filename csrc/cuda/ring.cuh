// Buffers in shared memory that one thread fills by TMA and warpgroups use up, round and round.
#pragma once

#include "ptx_sm90.cuh"

namespace fastattn::cuda {

// The barriers of kStages buffers. The n-th fill of all goes to buffer n % kStages, which is full
// when its bytes are there, and empty again when every warp that reads it has said so.
template <int kStages>
struct Ring {
  ptx::Barrier full[kStages], empty[kStages];

  FA_DEVICE void init(int readers) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], 1);
      ptx::mbarrier_init(&empty[stage], readers);
    }
  }

  // By the one thread that fills.
  FA_DEVICE void wait_empty(uint32_t n) {
    ptx::mbarrier_wait(&empty[n % kStages], parity(n) ^ 1);
  }
  // So many bytes will come; the barrier that they report to.
  FA_DEVICE ptx::Barrier* begin_fill(uint32_t n, int bytes) {
    ptx::Barrier* barrier = &full[n % kStages];
    ptx::mbarrier_expect(barrier, bytes);
    return barrier;
  }

  // By those who read.
  FA_DEVICE void wait_full(uint32_t n) {
    ptx::mbarrier_wait(&full[n % kStages], parity(n));
  }
  // By every lane of a reading warp: it has used the buffer up.
  FA_DEVICE void release(uint32_t n) {
    if (ptx::lane_id() == 0) ptx::mbarrier_arrive(&empty[n % kStages]);
  }

 private:
  static FA_DEVICE int parity(uint32_t n) {
    return static_cast<int>(n / kStages % 2);
  }
};

}  // namespace fastattn::cuda
