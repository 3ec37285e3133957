// Kernels without defects, and instructions against plain loops.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "kernels.h"

namespace fastattn::self_test {
namespace {

constexpr int kSeeds = 20;

int thread() {
  return static_cast<int>(threadIdx.x);
}

// Small numbers that bfloat16 holds.
float number(int i) {
  return static_cast<float>(i * 37 % 61 - 30) / 8;
}

// ---- Barriers, copies, shuffles -----------------------------------------------------------------

constexpr int kStages = 3, kTiles = 7;

// Sums tiles that arrive by a ring of copies; what one warp has copied another one reads.
void pipeline(const float* tiles, float* out, float* total) {
  auto* ring = static_cast<float4*>(ptx::shared_memory());
  const auto load = [&](int tile) {
    if (tile < kTiles) {
      ptx::cp_async_16(ring + tile % kStages * kThreads + thread(),
                       tiles + 4 * (tile * kThreads + thread()), tile == 2 ? 8 : 16);
    }
    ptx::cp_async_commit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  float sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync_block();
    load(tile + kStages - 1);
    const float4 x = ptx::load_shared(ring + tile % kStages * kThreads + (thread() ^ 64));
    sum += x.x + x.y + x.z + x.w;
  }
  ptx::cp_async_wait<0>();
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
  for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  if (ptx::lane_id() == 0) ptx::add_to_global(total, sum);
}

bool pipeline_is_right() {
  std::vector<float> tiles(4 * kTiles * kThreads + 4), out(2 * kThreads), expected(kThreads);
  float total = 0, expected_total = 0;
  float* base = tiles.data();
  while (reinterpret_cast<uintptr_t>(base) % 16 != 0) ++base;
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int i = 0; i < 4 * kThreads; ++i) {
      const float x = base[4 * tile * kThreads + i] = number(tile * 11 + i);
      if (tile != 2 || i % 4 < 2) expected[static_cast<size_t>(i / 4 ^ 64)] += x;
    }
  }
  for (const float x : expected) expected_total += 2 * x;
  const auto error = cuda::launch(pipeline, {2, kThreads, kStages * kThreads * 16, nullptr}, base,
                                  out.data(), &total);
  if (error != cudaSuccess) puts(cudaGetErrorString(error));
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] != expected[i % kThreads]) return false;
  }
  return error == cudaSuccess && total == expected_total;
}

// A transpose within each warp by sync_warp, votes, and broadcasts.
void exchange(int* out) {
  auto* words = static_cast<int*>(ptx::shared_memory()) + thread() / 32 * 32;
  const int lane = ptx::lane_id();
  for (int round = 0; round < 3; ++round) {
    ptx::store_shared(words + lane, lane * 10 + round);
    ptx::sync_warp();
    const int mirrored = ptx::load_shared(words + 31 - lane);
    ptx::sync_warp();
    const bool any = ptx::any_in_warp(lane == 9 && round == 1);
    const bool none = ptx::sync_block_or(thread() == kThreads);
    const bool one = ptx::sync_block_or(thread() == 100);
    const int third = ptx::shuffle(mirrored, 3);
    const bool is_right = mirrored == (31 - lane) * 10 + round && third == 280 + round &&
                          any == (round == 1) && !none && one;
    out[thread()] += is_right;
  }
}

bool exchange_is_right() {
  std::vector<int> out(kThreads);
  const auto error = run(exchange, out.data());
  if (error != cudaSuccess) puts(cudaGetErrorString(error));
  for (const int rounds : out) {
    if (rounds != 6) return false;
  }
  return error == cudaSuccess;
}

// Where each thread and block is.
void place(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned number = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++out[block * 64 + number];
}

bool place_is_right() {
  std::vector<int> out(3 * 5 * 2 * 64);
  const auto error = cuda::launch(place, {dim3(3, 5, 2), dim3(4, 8, 2), 0, nullptr}, out.data());
  for (const int visits : out) {
    if (visits != 1) return false;
  }
  return error == cudaSuccess;
}

// ---- Matrices -----------------------------------------------------------------------------------

template <typename T>
T rounded(float x) {
  return {static_cast<uint16_t>(ptx::pack(x, 0.0f, T{}))};
}

// d (16 x 8) = a (16 x 16) b (16 x 8), with a's rows and b's rows in shared memory.
template <typename T>
void product(const T* a, const T* b, float* d) {
  auto* const shared_a = static_cast<T*>(ptx::shared_memory());
  T* const shared_b = shared_a + 256;
  const int lane = ptx::lane_id();
  for (int i = lane; i < 256; i += 32) ptx::store_shared(shared_a + i, a[i]);
  for (int i = lane; i < 256; i += 32)
    ptx::store_shared(shared_b + i, i % 16 < 8 ? b[i / 16 * 8 + i % 16] : T{});
  ptx::sync_warp();
  uint32_t left[4], right[4];
  ptx::ldmatrix_x4(left, ptx::shared_address(shared_a + lane % 16 * 16 + lane / 16 * 8));
  ptx::ldmatrix_x4_trans(right, ptx::shared_address(shared_b + lane % 16 * 16 + lane / 16 * 8));
  float sum[4];
  const int g = lane / 4, t = lane % 4;
  float* const places[4] = {d + g * 8 + 2 * t, d + g * 8 + 2 * t + 1, d + (g + 8) * 8 + 2 * t,
                            d + (g + 8) * 8 + 2 * t + 1};
  for (int e = 0; e < 4; ++e) sum[e] = *places[e];
  ptx::mma_m16n8k16(sum, left, right[0], right[1], T{});
  for (int e = 0; e < 4; ++e) *places[e] = sum[e];
}

template <typename T>
bool product_is_right() {
  T a[256], b[128];
  float d[128], expected[128];
  for (int i = 0; i < 256; ++i) a[i] = rounded<T>(number(i));
  for (int i = 0; i < 128; ++i) b[i] = rounded<T>(number(3 * i + 1));
  for (int i = 0; i < 128; ++i) {
    double sum = d[i] = number(5 * i);
    for (int k = 0; k < 16; ++k) {
      sum += static_cast<double>(ptx::to_float(a[i / 8 * 16 + k])) *
             static_cast<double>(ptx::to_float(b[k * 8 + i % 8]));
    }
    expected[i] = static_cast<float>(sum);
  }
  const auto error = cuda::launch(product<T>, {1, 32, 1024, nullptr}, a, b, d);
  if (error != cudaSuccess) puts(cudaGetErrorString(error));
  return error == cudaSuccess && memcmp(d, expected, sizeof(d)) == 0;
}

// ldmatrix: lane 4r + c gets elements 2c and 2c + 1 of row r; transposed, elements r of rows 2c and
// 2c + 1.
void read_matrices(uint16_t* out) {
  auto* const rows = static_cast<uint16_t*>(ptx::shared_memory());
  const int lane = ptx::lane_id();
  for (int i = 0; i < 8; ++i) {
    ptx::store_shared(rows + lane * 8 + i, static_cast<uint16_t>(lane * 8 + i));
  }
  ptx::sync_warp();
  uint32_t plain[4], transposed[4];
  ptx::ldmatrix_x4(plain, ptx::shared_address(rows + lane * 8));
  ptx::ldmatrix_x4_trans(transposed, ptx::shared_address(rows + lane * 8));
  memcpy(out + lane * 16, plain, 16);
  memcpy(out + lane * 16 + 8, transposed, 16);
}

bool matrices_are_right() {
  std::vector<uint16_t> out(32 * 16);
  if (cuda::launch(read_matrices, {1, 32, 512, nullptr}, out.data()) != cudaSuccess) return false;
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      for (int e = 0; e < 2; ++e) {
        const int r = lane / 4, c = lane % 4;
        const uint16_t* word = &out[static_cast<size_t>(lane * 16 + 2 * m + e)];
        if (word[0] != (8 * m + r) * 8 + 2 * c + e) return false;
        if (word[8] != (8 * m + 2 * c + e) * 8 + r) return false;
      }
    }
  }
  return true;
}

// ---- Numbers ------------------------------------------------------------------------------------

bool numbers_are_right() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const f16 half = {static_cast<uint16_t>(bits)};
    const bf16 brain = {static_cast<uint16_t>(bits)};
    const float x = ptx::to_float(half), y = ptx::to_float(brain);
    if (rounded<f16>(x).bits != (isnan(x) ? 0x7fff : bits)) return false;
    if (rounded<bf16>(y).bits != (isnan(y) ? 0x7fff : bits)) return false;
    // Half way to the next number: to the even one.
    const float next = ptx::to_float(f16{static_cast<uint16_t>(bits + 1)});
    const uint32_t even = bits + (bits & 1);
    if (isfinite(next) && isfinite(x) && rounded<f16>((x + next) / 2).bits != even) return false;
  }
  return ptx::exp2(-INFINITY) == 0 && ptx::exp2(-126) == 0x1p-126f && ptx::exp2(-127) == 0 &&
         ptx::exp2(10) == 1024 && ptx::exp2(INFINITY) == INFINITY && isnan(ptx::exp2(NAN)) &&
         rounded<f16>(65519).bits == 0x7bff && rounded<f16>(65520).bits == 0x7c00 &&
         rounded<f16>(1e9f).bits == 0x7c00 && rounded<f16>(-0x1p-26f).bits == 0x8000 &&
         ptx::pack(1, 2, bf16{}) == 0x40003f80 && ptx::pack(1, 2, f16{}) == 0x40003c00;
}

// Threads of the host that launch at the same time take turns.
bool host_threads_are_right() {
  constexpr int kHostThreads = 4;
  std::vector<std::thread> threads;
  bool is_right[kHostThreads];
  for (bool& result : is_right) {
    threads.emplace_back([&result] { result = exchange_is_right() && pipeline_is_right(); });
  }
  for (std::thread& thread : threads) thread.join();
  return std::all_of(is_right, is_right + kHostThreads, [](bool right) { return right; });
}

bool with_all_seeds(bool (*is_right)()) {
  bool all = true;
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(static_cast<uint64_t>(seed));
    all &= is_right();
  }
  return all;
}

}  // namespace

void run_right_kernels() {
  report("pipeline", with_all_seeds(pipeline_is_right));
  report("exchange", with_all_seeds(exchange_is_right));
  report("place", with_all_seeds(place_is_right));
  report("matrices", with_all_seeds(matrices_are_right));
  report("product of bf16", with_all_seeds(product_is_right<bf16>));
  report("product of f16", with_all_seeds(product_is_right<f16>));
  report("host threads", with_all_seeds(host_threads_are_right));
  report("numbers", numbers_are_right());
}

}  // namespace fastattn::self_test
