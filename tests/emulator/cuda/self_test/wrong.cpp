// One kernel per defect that the emulator is to catch.
#include <math.h>
#include <string.h>

#include "kernels.h"

namespace fastattn::self_test {
namespace {

float* floats() {
  return static_cast<float*>(ptx::shared_memory());
}

int thread() {
  return static_cast<int>(threadIdx.x);
}

alignas(16) float source[4 * kThreads];

// ---- Races --------------------------------------------------------------------------------------

void read_of_another_warp(float* out) {
  ptx::store_shared(floats() + thread(), 1.0f);
  ptx::sync_warp();
  out[thread()] = ptx::load_shared(floats() + (thread() + 32) % kThreads);
}

void read_of_another_lane(float* out) {
  ptx::store_shared(floats() + thread(), 1.0f);
  ptx::shuffle(0, 0);  // orders nothing
  out[thread()] = ptx::load_shared(floats() + (thread() ^ 1));
}

void write_after_read() {
  ptx::store_shared(floats() + thread(), 1.0f);
  ptx::sync_block();
  ptx::load_shared(floats() + (thread() ^ 64));
  ptx::store_shared(floats() + thread(), 2.0f);
}

void write_after_write() {
  ptx::store_shared(floats(), static_cast<float>(thread()));
}

void halves_of_a_word() {
  auto* halves = static_cast<bf16*>(ptx::shared_memory());
  ptx::store_shared(halves + thread(), bf16{0});  // no race: each its own
  if (thread() == 77) ptx::store_shared(halves + 78, bf16{0});
}

void ldmatrix_of_what_another_lane_wrote(uint32_t* out) {
  auto* rows = static_cast<uint4*>(ptx::shared_memory());
  ptx::store_shared(rows + thread(), uint4{});
  uint32_t x[4];
  ptx::ldmatrix_x4(x, ptx::shared_address(rows + thread()));
  out[thread()] = x[0];
}

void write_after_ldmatrix() {
  auto* rows = static_cast<uint4*>(ptx::shared_memory());
  ptx::store_shared(rows + thread(), uint4{});
  ptx::sync_warp();
  uint32_t x[4];
  ptx::ldmatrix_x4(x, ptx::shared_address(rows + thread()));
  ptx::store_shared(rows + thread(), uint4{});
}

void copy_over_what_is_read() {
  auto* rows = static_cast<uint4*>(ptx::shared_memory());
  ptx::store_shared(rows + thread(), uint4{});
  ptx::sync_block();
  ptx::load_shared(rows + thread());
  ptx::cp_async_16(rows + (thread() ^ 1), source, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

// ---- Copies -------------------------------------------------------------------------------------

void copy(int shared_offset = 0, int global_offset = 0, int bytes = 16) {
  ptx::cp_async_16(floats() + 4 * thread() + shared_offset, source + global_offset, bytes);
}

void read_of_pending_copy(float* out) {
  copy();
  ptx::cp_async_commit();
  out[thread()] = ptx::load_shared(floats() + 4 * thread());
  ptx::cp_async_wait<0>();
}

void wait_for_too_few(float* out) {
  copy();
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::sync_block();
  out[thread()] = ptx::load_shared(floats() + 4 * thread());
}

void wait_without_commit(float* out) {
  copy();
  ptx::cp_async_wait<0>();
  out[thread()] = ptx::load_shared(floats() + 4 * thread());
}

void write_to_pending_copy() {
  copy();
  ptx::store_shared(floats() + 4 * thread(), 0.0f);
}

void copy_to_pending_copy() {
  copy();
  copy();
}

void no_barrier_after_wait(float* out) {
  copy();
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[thread()] = ptx::load_shared(floats() + 4 * (thread() ^ 1));
}

void copy_not_waited_for() {
  copy();
  ptx::cp_async_commit();
}

void copy_to_misaligned() {
  copy(1);
}

void copy_from_misaligned() {
  copy(0, 1);
}

// ---- Addresses ----------------------------------------------------------------------------------

void beyond_the_end() {
  ptx::store_shared(floats() + 1024 - kThreads / 2 + thread(), 0.0f);
}

void before_the_start() {
  ptx::load_shared(floats() - 1);
}

void misaligned() {
  ptx::load_shared(reinterpret_cast<const float4*>(floats() + thread()));
}

void write_beside() {
  floats()[1024] = 0.0f;
}

// ---- Meetings -----------------------------------------------------------------------------------

void barrier_of_some() {
  if (thread() >= 32) ptx::sync_block();
}

void barrier_of_the_living() {
  if (thread() < 32) return;
  for (int i = 0; i < 3; ++i) ptx::sync_block();
}

void two_barriers() {
  if (thread() < 64) {
    ptx::sync_block();
  } else {
    ptx::sync_block();
  }
}

void barrier_against_warp() {
  if (thread() != 5) ptx::sync_warp();
  ptx::sync_block();
}

void two_operations() {
  if (thread() % 32 < 7) {
    ptx::shuffle(1, 0);
  } else {
    ptx::shuffle_xor(1, 1);
  }
}

void lane_that_ended() {
  if (thread() % 32 == 31) return;
  ptx::any_in_warp(true);
}

// ---- Other --------------------------------------------------------------------------------------

void uninitialised(float* out) {
  out[thread()] = ptx::load_shared(floats() + thread());
}

float recurse(int depth) {
  volatile float local[64];
  local[0] = static_cast<float>(depth);
  return depth == 0 ? local[0] : recurse(depth - 1) + local[0];
}

void overflow(float* out) {
  out[0] = recurse(1 << 20);
}

void write_to(float* pointer) {
  if (thread() == 3) pointer[2] = 0.0f;
}

}  // namespace

void run_wrong_kernels() {
  static float out[kThreads];
  static uint32_t words[kThreads];
  report("race across warps", run(read_of_another_warp, out));
  report("race within a warp", run(read_of_another_lane, out));
  report("write after read", run(write_after_read));
  report("write after write", run(write_after_write));
  report("write of a half word", run(halves_of_a_word));
  report("ldmatrix too early", run(ldmatrix_of_what_another_lane_wrote, words));
  report("write after ldmatrix", run(write_after_ldmatrix));
  report("copy over what is read", run(copy_over_what_is_read));
  report("read of a pending copy", run(read_of_pending_copy, out));
  report("wait for too few", run(wait_for_too_few, out));
  report("wait without commit", run(wait_without_commit, out));
  report("write to a pending copy", run(write_to_pending_copy));
  report("copy to a pending copy", run(copy_to_pending_copy));
  report("no barrier after a wait", run(no_barrier_after_wait, out));
  report("copy not waited for", run(copy_not_waited_for));
  report("copy to misaligned", run(copy_to_misaligned));
  report("copy from misaligned", run(copy_from_misaligned));
  report("beyond the end", run(beyond_the_end));
  report("before the start", run(before_the_start));
  report("misaligned", run(misaligned));
  report("guard band", run(write_beside));
  report("barrier of some", run(barrier_of_some));
  report("barrier of the living", run(barrier_of_the_living));
  report("two barriers", run(two_barriers));
  report("barrier against sync_warp", run(barrier_against_warp));
  report("two operations", run(two_operations));
  report("lane that ended", run(lane_that_ended));
  const cudaLaunchConfig_t config = {1, kThreads, 49 << 10, nullptr, nullptr, 0};
  report("shared memory unasked for", cudaLaunchKernelEx(&config, write_after_write));
  report("too much shared memory",
         cuda::launch(write_after_write, {1, kThreads, 164 << 10, nullptr}));
  report("half a warp", cuda::launch(write_after_write, {1, 48, 4096, nullptr}));
  report("empty grid", cuda::launch(write_after_write, {0, kThreads, 4096, nullptr}));
  const cudaError_t error = run(uninitialised, out);
  report("uninitialised memory is NaN", error == cudaSuccess && isnan(out[5]));
}

void run_fault(const char* which) {
  if (strcmp(which, "overflow") == 0) {
    static float out[1];
    run(overflow, out);
  } else {
    run(write_to, nullptr);
  }
}

}  // namespace fastattn::self_test
