// One kernel per defect that the emulator is to catch, over what sm_90a alone has.
#include <math.h>

#include "kernels.h"
#include "ptx_sm90.cuh"

namespace fastattn::self_test {
namespace {

using cuda::TensorBox, cuda::TensorMap;
using ptx::Barrier, ptx::Major;

constexpr int kBytes = 40 << 10;
alignas(128) float source[64 * 64];

int thread() {
  return static_cast<int>(threadIdx.x);
}

// Panels of 8 KB, and two barriers behind them.
struct Shared {
  alignas(1024) float panels[4][2048];
  Barrier barriers[2];
};

Shared* shared() {
  return static_cast<Shared*>(ptx::shared_memory_1024());
}

Barrier* barrier(int i = 0) {
  return &shared()->barriers[i];
}

// 32 x 64 floats of `source`.
TensorMap map_of_source() {
  TensorMap map = {};
  const TensorBox tensor = {DType::kFloat32, 2, source, {64, 64}, {256}, {32, 64}, true};
  if (cuda::encode_tensor_map(&map, tensor) != cudaSuccess) puts("no tensor map");
  return map;
}

void init(int arrivals) {
  if (thread() == 0) {
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(barrier(i), arrivals);
    ptx::mbarrier_fence_init();
  }
  ptx::sync_block();
}

// ---- mbarriers ----------------------------------------------------------------------------------

void arrive_uninitialised() {
  ptx::mbarrier_arrive(barrier());
}

void init_twice() {
  if (thread() != 0) return;
  ptx::mbarrier_init(barrier(), 1);
  ptx::mbarrier_init(barrier(), 1);
}

void arrive_unordered() {
  if (thread() == 0) ptx::mbarrier_init(barrier(), kThreads);
  ptx::sync_warp();
  if (thread() == 0) return;
  ptx::mbarrier_arrive(barrier());
}

void too_many_arrivals() {
  init(1);
  if (thread() >= 2) return;
  ptx::mbarrier_expect(barrier(), 128);
}

void wait_for_nobody() {
  init(2);
  if (thread() == 0) ptx::mbarrier_arrive(barrier());
  ptx::mbarrier_wait(barrier(), 0);
}

void wait_for_the_wrong_parity() {
  init(kThreads);
  ptx::mbarrier_arrive(barrier());
  ptx::mbarrier_wait(barrier(), 0);
  ptx::mbarrier_wait(barrier(), 0);
  ptx::mbarrier_wait(barrier(), 1);
}

void missed_phase() {
  init(1);
  if (thread() == 0) {
    // Until all others wait.
    ptx::mbarrier_wait(barrier(1), 1);
    ptx::mbarrier_arrive(barrier());
    ptx::mbarrier_arrive(barrier());
    return;
  }
  ptx::mbarrier_wait(barrier(), 0);
}

void store_to_barrier() {
  init(1);
  if (thread() == 3) ptx::store_shared(reinterpret_cast<int*>(barrier()), 0);
}

// The lanes beside the one that arrives have not told it that they have written.
void arrival_of_one_lane(float* out) {
  init(kThreads / 32);
  float* const words = shared()->panels[0];
  ptx::store_shared(words + thread(), 1.0f);
  if (ptx::lane_id() == 0) ptx::mbarrier_arrive(barrier());
  ptx::mbarrier_wait(barrier(), 0);
  out[thread()] = ptx::load_shared(words + (thread() + 33) % kThreads);
}

void wait_of_one_lane(float* out) {
  init(kThreads);
  float* const words = shared()->panels[0];
  ptx::store_shared(words + thread(), 1.0f);
  ptx::mbarrier_arrive(barrier());
  if (ptx::lane_id() == 0) ptx::mbarrier_wait(barrier(), 0);
  ptx::any_in_warp(true);  // orders nothing
  out[thread()] = ptx::load_shared(words + (thread() + 33) % kThreads);
}

// ---- TMA ----------------------------------------------------------------------------------------

void load_source(const TensorMap* map, int panel = 0, int offset = 0) {
  ptx::mbarrier_expect(barrier(), 8192);
  ptx::tma_load<2>(shared()->panels[panel] + offset, map, {0, 0}, barrier());
}

void load_without_fence_init(const __grid_constant__ TensorMap map) {
  if (thread() == 0) ptx::mbarrier_init(barrier(), 1);
  ptx::sync_block();
  if (thread() == 0) load_source(&map);
}

void touch_pending_load(const __grid_constant__ TensorMap map) {
  init(1);
  if (thread() == 0) load_source(&map);
  ptx::sync_block();
  ptx::load_shared(shared()->panels[0] + thread());
}

void load_not_waited_for(const __grid_constant__ TensorMap map) {
  init(1);
  if (thread() == 0) load_source(&map);
}

void load_of_too_few_bytes(const __grid_constant__ TensorMap map) {
  init(1);
  if (thread() == 0) {
    ptx::mbarrier_expect(barrier(), 16384);
    ptx::tma_load<2>(shared()->panels[0], &map, {0, 0}, barrier());
  }
  ptx::mbarrier_wait(barrier(), 0);
}

// Another thread has waited for the copy, or is about to; this one for another copy alone.
void wait_for_another_load(const __grid_constant__ TensorMap map, float* out) {
  init(1);
  if (thread() == 0) {
    load_source(&map);
    ptx::mbarrier_expect(barrier(1), 64);
    ptx::bulk_load(shared()->panels[1], source, 64, barrier(1));
    ptx::mbarrier_wait(barrier(0), 0);
  }
  ptx::mbarrier_wait(barrier(1), 0);
  out[thread()] = ptx::load_shared(shared()->panels[0]);
}

void load_misaligned(const __grid_constant__ TensorMap map) {
  init(1);
  if (thread() == 0) load_source(&map, 0, 32);
}

void load_of_another_rank(const __grid_constant__ TensorMap map) {
  init(1);
  if (thread() == 0) ptx::tma_load<3>(shared()->panels[0], &map, {0, 0, 0}, barrier());
}

void load_without_map(const __grid_constant__ TensorMap) {
  static const TensorMap map = {};
  init(1);
  if (thread() == 0) load_source(&map);
}

void bulk_load_of_odd_bytes() {
  init(1);
  if (thread() == 0) ptx::bulk_load(shared()->panels[0], source, 24, barrier());
}

void load_over_what_is_read(const __grid_constant__ TensorMap map) {
  init(1);
  if (thread() == 0) load_source(&map);
  ptx::mbarrier_wait(barrier(), 0);
  ptx::load_shared(shared()->panels[0] + thread());
  if (thread() == 0) load_source(&map);
}

void load_over_unfenced_stores(const __grid_constant__ TensorMap map) {
  ptx::store_shared(shared()->panels[0] + thread(), 0.0f);
  init(1);
  if (thread() == 0) load_source(&map);
}

void store_tile() {
  for (int i = thread(); i < 2048; i += kThreads) {
    ptx::store_shared(shared()->panels[0] + i, 1.0f);
  }
}

void store_of_unfenced(const __grid_constant__ TensorMap map) {
  store_tile();
  ptx::sync_block();
  if (thread() != 0) return;
  ptx::fence_async_proxy();  // of its own stores alone
  ptx::tma_store<2>(&map, {0, 0}, shared()->panels[0]);
}

void store_fenced_too_late(const __grid_constant__ TensorMap map) {
  store_tile();
  ptx::sync_block();
  ptx::fence_async_proxy();
  ptx::sync_warp();
  if (thread() == 0) ptx::tma_store<2>(&map, {0, 0}, shared()->panels[0]);
}

void store_unordered(const __grid_constant__ TensorMap map) {
  store_tile();
  ptx::fence_async_proxy();
  ptx::sync_warp();
  if (thread() != 0) return;
  ptx::tma_store<2>(&map, {0, 0}, shared()->panels[0]);
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

void overwritten_store(const __grid_constant__ TensorMap map) {
  store_tile();
  ptx::fence_async_proxy();
  ptx::sync_block();
  if (thread() == 0) {
    ptx::tma_store<2>(&map, {0, 0}, shared()->panels[0]);
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
  }
  ptx::sync_block();
  store_tile();
}

void store_not_waited_for(const __grid_constant__ TensorMap map) {
  store_tile();
  ptx::fence_async_proxy();
  ptx::sync_block();
  if (thread() != 0) return;
  ptx::tma_store<2>(&map, {0, 0}, shared()->panels[0]);
  ptx::bulk_wait<0>();  // for what is committed
}

// ---- Products -----------------------------------------------------------------------------------

constexpr int kN = 16;

void store_operands() {
  for (int i = thread(); i < 4096; i += static_cast<int>(blockDim.x)) {
    ptx::store_shared(shared()->panels[0] + i, 0.0f);
  }
}

void load_operands() {
  store_operands();
  ptx::fence_async_proxy();
  ptx::sync_block();
}

uint64_t operand(int panel, int offset = 0) {
  return ptx::wgmma_descriptor(shared()->panels[panel] + offset / 4, 0, 1024);
}

void multiply(float (&d)[kN / 8][4], bool accumulate = false) {
  ptx::wgmma<Major::kK, Major::kK, kN>(d, operand(0), operand(1), accumulate, bf16{});
}

void product_without_fence() {
  load_operands();
  float d[kN / 8][4];
  multiply(d);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

void fence_before_the_wait() {
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  d[0][0] *= 2;
  multiply(d, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

void accumulator_written_after_fence() {
  load_operands();
  float d[kN / 8][4] = {};
  for (int i = 0; i < 2; ++i) {
    ptx::wgmma_fence();
    if (thread() == 70) d[0][1] += 1;
    multiply(d, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
}

void a_written_after_fence() {
  load_operands();
  float d[kN / 8][4];
  uint32_t a[4] = {};
  for (uint32_t i = 0; i < 2; ++i) {
    ptx::wgmma_fence();
    a[2] = i;
    ptx::wgmma<Major::kK, kN>(d, a, operand(1), false, f16{});
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
}

void a_written_before_wait() {
  load_operands();
  float d[kN / 8][4];
  uint32_t a[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma<Major::kK, kN>(d, a, operand(1), false, f16{});
  ptx::wgmma_commit();
  if (thread() == 9) a[0] = 1;
  ptx::wgmma_wait<0>();
}

void accumulator_written_before_wait() {
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
  ptx::wgmma_commit();
  d[1][3] = 0;
  ptx::wgmma_wait<0>();
}

void accumulator_read_before_wait(float* out) {
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
  ptx::wgmma_commit();
  out[thread()] = d[1][3];
  ptx::wgmma_wait<0>();
}

void operand_overwritten() {
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  store_operands();
  ptx::sync_block();
}

void load_over_operand(const __grid_constant__ TensorMap map) {
  init(1);
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
  ptx::wgmma_commit();
  if (thread() == 0) load_source(&map, 1);
  ptx::wgmma_wait<0>();
}

void operand_overwritten_by_another_group() {
  load_operands();
  if (thread() >= kThreads) return store_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

void unfenced_operands() {
  store_operands();
  ptx::sync_block();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
}

void unordered_operands() {
  store_operands();
  ptx::fence_async_proxy();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
}

// All but one thread of the warpgroup have waited for the operand.
void operands_not_awaited_by_all(const __grid_constant__ TensorMap map) {
  init(1);
  load_operands();
  if (thread() == 0) load_source(&map);
  if (thread() != 99) ptx::mbarrier_wait(barrier(), 0);
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
}

void product_not_waited_for() {
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  multiply(d);
  ptx::wgmma_wait<0>();
}

void operand_out_of_place() {
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  ptx::wgmma<Major::kK, Major::kK, kN>(d, operand(0, 128), operand(1), false, bf16{});
}

void operand_of_another_layout() {
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  ptx::wgmma<Major::kK, Major::kK, kN>(d, operand(0), operand(1) ^ uint64_t{3} << 62, false,
                                       bf16{});
}

void operands_per_warp() {
  load_operands();
  float d[kN / 8][4];
  ptx::wgmma_fence();
  ptx::wgmma<Major::kK, Major::kK, kN>(d, operand(thread() < 96 ? 0 : 1), operand(1), false,
                                       bf16{});
}

void product_of_three_warps() {
  if (thread() < 96) ptx::wgmma_fence();
  ptx::sync_block();
}

void product_of_part_of_a_group() {
  ptx::wgmma_fence();
}

// ---- Warps --------------------------------------------------------------------------------------

void sync_of_other_counts() {
  ptx::sync_named(1, thread() < 64 ? 96 : 128);
}

void sync_of_too_few() {
  if (thread() < 64) ptx::sync_named(3, 128);
}

void arrival_twice() {
  if (thread() < 32) {
    ptx::arrive_named(1, 128);
    ptx::arrive_named(1, 128);
  }
}

void arrival_without_sync() {
  if (thread() < 32) ptx::arrive_named(1, 128);
}

void sync_at_zero() {
  ptx::sync_named(0, 128);
}

void sync_of_half_a_warp() {
  if (thread() % 32 < 16) ptx::sync_named(1, 128);
  ptx::sync_block();
}

// Who only arrives does not learn what the others have done.
void read_after_arrival(float* out) {
  float* const words = shared()->panels[0];
  if (thread() < 64) {
    ptx::store_shared(words + thread(), 1.0f);
    ptx::sync_named(1, 128);
  } else {
    ptx::arrive_named(1, 128);
    out[thread()] = ptx::load_shared(words + thread() - 64);
  }
}

void too_many_registers() {
  ptx::fewer_registers<128>();
  ptx::more_registers<256>();
}

void fewer_registers_that_are_more() {
  ptx::fewer_registers<128>();
  ptx::fewer_registers<136>();
}

// ---- Turns of blocks ----------------------------------------------------------------------------

struct Turn {
  uint32_t begun, turn;
  alignas(16) float sums[4];
};

// Adds 1 to the sums, in the order in which blocks begin but for what a defect leaves out.
void add_in_turn(Turn* global, bool waits, bool awaits_sums, uint32_t first) {
  if (thread() != 0) return;
  const uint32_t nth = ptx::fetch_add(&global->begun, 1);
  float* const staged = shared()->panels[0];
  for (int i = 0; i < 4; ++i) ptx::store_shared(staged + i, 1.0f);
  ptx::fence_async_proxy();
  if (waits) ptx::await_global(&global->turn, first + nth);
  ptx::bulk_add(global->sums, staged, sizeof(global->sums));
  ptx::bulk_commit();
  if (awaits_sums) {
    ptx::bulk_wait<0>();
  } else {
    ptx::bulk_wait_read<0>();
  }
  ptx::release_global(&global->turn, nth + 1);
}

template <typename... Params>
cudaError_t run_large(int threads, void (*kernel)(Params...),
                      const std::type_identity_t<Params>&... params) {
  return cuda::launch(kernel, {1, static_cast<unsigned>(threads), kBytes, nullptr}, params...);
}

void run_wrong_barriers() {
  static float out[kThreads];
  report("arrival at nothing", run_large(kThreads, arrive_uninitialised));
  report("mbarrier_init twice", run_large(kThreads, init_twice));
  report("arrival before the init", run_large(kThreads, arrive_unordered));
  report("too many arrivals", run_large(kThreads, too_many_arrivals));
  report("wait for nobody", run_large(kThreads, wait_for_nobody));
  report("wait for the wrong parity", run_large(kThreads, wait_for_the_wrong_parity));
  report("missed phase", run_large(kThreads, missed_phase));
  report("store to an mbarrier", run_large(kThreads, store_to_barrier));
  report("arrival of one lane", run_large(kThreads, arrival_of_one_lane, out));
  report("wait of one lane", run_large(kThreads, wait_of_one_lane, out));
  report("named barrier of other counts", run_large(kThreads, sync_of_other_counts));
  report("named barrier of too few", run_large(kThreads, sync_of_too_few));
  report("named barrier reached twice", run_large(kThreads, arrival_twice));
  report("named barrier left over", run_large(kThreads, arrival_without_sync));
  report("named barrier 0", run_large(kThreads, sync_at_zero));
  report("named barrier of half a warp", run_large(kThreads, sync_of_half_a_warp));
  report("read after arrive_named", run_large(kThreads, read_after_arrival, out));
  report("too many registers", run_large(3 * kThreads, too_many_registers));
  report("fewer registers that are more", run_large(3 * kThreads, fewer_registers_that_are_more));
}

void run_wrong_copies(const TensorMap& map) {
  static float out[kThreads];
  report("wait for another load", run_large(kThreads, wait_for_another_load, map, out));
  report("load without fence_init", run_large(kThreads, load_without_fence_init, map));
  report("touch of a pending load", run_large(kThreads, touch_pending_load, map));
  report("load not waited for", run_large(kThreads, load_not_waited_for, map));
  report("load of too few bytes", run_large(kThreads, load_of_too_few_bytes, map));
  report("load to misaligned", run_large(kThreads, load_misaligned, map));
  report("load of another rank", run_large(kThreads, load_of_another_rank, map));
  report("load without a map", run_large(kThreads, load_without_map, map));
  report("load of odd bytes", run_large(kThreads, bulk_load_of_odd_bytes));
  report("load over what is read", run_large(kThreads, load_over_what_is_read, map));
  report("load over unfenced stores", run_large(kThreads, load_over_unfenced_stores, map));
  report("store of unfenced stores", run_large(kThreads, store_of_unfenced, map));
  report("store fenced too late", run_large(kThreads, store_fenced_too_late, map));
  report("store without a barrier", run_large(kThreads, store_unordered, map));
  report("store overwritten", run_large(kThreads, overwritten_store, map));
  report("store not waited for", run_large(kThreads, store_not_waited_for, map));
}

void run_wrong_turns() {
  static Turn turn;
  const auto run_blocks = [](bool waits, bool awaits_sums, uint32_t first) {
    turn = {};
    return cuda::launch(add_in_turn, {3, kThreads, kBytes, nullptr}, &turn, waits, awaits_sums,
                        first);
  };
  const cudaError_t error = run_blocks(true, true, 0);
  report("turns in order", error == cudaSuccess && turn.sums[3] == 3);
  report("sum out of turn", run_blocks(false, true, 0));
  report("turn passed on too early", run_blocks(true, false, 0));
  report("turn that nobody passes on", run_blocks(true, true, 1));
}

void run_wrong_products(const TensorMap& map) {
  static float out[kThreads];
  report("product without a fence", run_large(kThreads, product_without_fence));
  report("product without another fence", run_large(kThreads, fence_before_the_wait));
  report("accumulator after the fence", run_large(kThreads, accumulator_written_after_fence));
  report("A after the fence", run_large(kThreads, a_written_after_fence));
  report("A before the wait", run_large(kThreads, a_written_before_wait));
  report("accumulator before the wait", run_large(kThreads, accumulator_written_before_wait));
  report("operand overwritten", run_large(kThreads, operand_overwritten));
  report("operand loaded over", run_large(kThreads, load_over_operand, map));
  report("operand of another group", run_large(2 * kThreads, operand_overwritten_by_another_group));
  report("unfenced operands", run_large(kThreads, unfenced_operands));
  report("unordered operands", run_large(kThreads, unordered_operands));
  report("operands not awaited by all", run_large(kThreads, operands_not_awaited_by_all, map));
  report("product not waited for", run_large(kThreads, product_not_waited_for));
  report("operand out of place", run_large(kThreads, operand_out_of_place));
  report("operand of another layout", run_large(kThreads, operand_of_another_layout));
  report("operands per warp", run_large(kThreads, operands_per_warp));
  report("product of three warps", run_large(kThreads, product_of_three_warps));
  report("product of part of a group", run_large(96, product_of_part_of_a_group));
  const cudaError_t error = run_large(kThreads, accumulator_read_before_wait, out);
  report("accumulators are NaN before the wait", error == cudaSuccess && isnan(out[5]));
}

// What encode_tensor_map refuses.
bool refuses(const TensorBox& tensor) {
  TensorMap map;
  return cuda::encode_tensor_map(&map, tensor) == cudaErrorInvalidValue;
}

bool refuses_wrong_boxes() {
  const TensorBox right = {DType::kFloat32, 2, source, {64, 64}, {256}, {32, 64}, true};
  TensorBox empty = right, odd = right, still = right, large = right, shifted = right, wide = right;
  empty.sizes[1] = 0;
  odd.strides[0] = 260;
  still.strides[0] = 0;
  large.box[1] = 257;
  shifted.data = source + 1;
  wide.box[0] = 64;
  TensorBox single = still;
  single.sizes[1] = 1;
  return !refuses(right) && !refuses(single) && refuses(empty) && refuses(odd) && refuses(still) &&
         refuses(large) && refuses(shifted) && refuses(wide);
}

}  // namespace

void run_wrong_sm90_kernels() {
  report("sm_90a on sm_80", run(arrive_uninitialised));
  cudaSetDevice(1);
  const TensorMap map = map_of_source();
  run_wrong_barriers();
  run_wrong_copies(map);
  run_wrong_turns();
  run_wrong_products(map);
  report("wrong boxes are refused", refuses_wrong_boxes());
  cudaSetDevice(0);
}

}  // namespace fastattn::self_test
