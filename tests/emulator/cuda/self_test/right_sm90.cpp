// Kernels without defects over what sm_90a alone has, against plain loops.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "kernels.h"
#include "ptx_sm90.cuh"

namespace fastattn::self_test {
namespace {

using cuda::TensorBox, cuda::TensorMap;
using ptx::Barrier, ptx::Major;

constexpr int kSeeds = 3;
constexpr int kStages = 2, kDepth = 64, kPanel = 64, kGroups = 2, kRows = kGroups * 64;
constexpr int kPanelBytes = 64 * 128;

int thread() {
  return static_cast<int>(threadIdx.x);
}

int group() {
  return thread() / ptx::kWarpgroupSize;
}

// Small numbers that bfloat16 holds.
float number(int i) {
  return static_cast<float>(i * 37 % 61 - 30) / 8;
}

template <typename T>
T rounded(float x) {
  return {static_cast<uint16_t>(ptx::pack(x, 0.0f, T{}))};
}

// A matrix whose rows begin at multiples of 16 bytes.
template <typename T>
struct Matrix {
  int rows, columns, pitch;
  std::unique_ptr<T[], decltype(&free)> data;

  Matrix(int rows_, int columns_)
      : rows(rows_),
        columns(columns_),
        pitch((columns + 7) / 8 * 8),
        data(static_cast<T*>(aligned_alloc(64, static_cast<size_t>(rows * pitch + 64) * 64)),
             free) {
    memset(data.get(), 0xff, static_cast<size_t>(rows * pitch) * sizeof(T));
  }
  T& at(int row, int column) const {
    return data[static_cast<size_t>(row * pitch + column)];
  }
  TensorMap map(DType dtype, int box_columns, int box_rows, bool swizzled) const {
    TensorBox tensor = {dtype,
                        2,
                        data.get(),
                        {columns, rows},
                        {static_cast<int64_t>(pitch * static_cast<int>(sizeof(T)))},
                        {box_columns, box_rows},
                        swizzled};
    TensorMap encoded;
    if (cuda::encode_tensor_map(&encoded, tensor) != cudaSuccess) puts("no tensor map");
    return encoded;
  }
};

// ---- A product with every kind of operand -------------------------------------------------------

// C (rows x kN) = A (rows x depth) B (depth x kN).
struct ProductParams {
  TensorMap a, b, c;
  const uint16_t* a_data;
  int a_pitch, rows, depth;
  float* sums;  // of the columns of C; kN, 16-byte aligned
};

template <int kN>
struct ProductShared {
  static constexpr int kPanelsOfN = (kN + kPanel - 1) / kPanel;
  unsigned char a[kStages][kRows * kDepth * 2];
  unsigned char b[kStages][kPanelsOfN * kPanelBytes];
  float c[kGroups][64][kN];
  float sums[kGroups][kN];
  Barrier full[kStages], empty[kStages];
};

template <Major kA, Major kB, bool kFromRegisters, int kN, typename T>
struct Product {
  using Shared = ProductShared<kN>;
  static constexpr int kBytesOfB = kN * kDepth * 2;
  static constexpr int kBoxesOfB = Shared::kPanelsOfN;

  static void produce(const ProductParams& params, Shared* shared, int tiles) {
    ptx::fewer_registers<40>();
    if (thread() != kGroups * ptx::kWarpgroupSize) return;
    ptx::tma_prefetch_map(&params.a);
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages, k = tile * kDepth;
      Barrier* const full = &shared->full[stage];
      ptx::mbarrier_wait(&shared->empty[stage], tile / kStages % 2 ^ 1);
      constexpr int kBytes = (kFromRegisters ? 0 : kRows * kDepth * 2) +
                             (kB == Major::kK ? kBytesOfB : kBoxesOfB * kPanelBytes);
      ptx::mbarrier_expect(full, kBytes);
      for (int g = 0; g < kGroups && !kFromRegisters; ++g) {
        unsigned char* const panel = shared->a[stage] + g * kPanelBytes;
        if (kA == Major::kK) ptx::tma_load<2>(panel, &params.a, {k, g * 64}, full);
        if (kA == Major::kMN) ptx::tma_load<2>(panel, &params.a, {g * 64, k}, full);
      }
      if (kB == Major::kK) ptx::tma_load<2>(shared->b[stage], &params.b, {k, 0}, full);
      for (int p = 0; p < kBoxesOfB && kB == Major::kMN; ++p) {
        ptx::tma_load<2>(shared->b[stage] + p * kPanelBytes, &params.b, {p * kPanel, k}, full);
      }
    }
  }

  static void load_a(const ProductParams& params, int k, uint32_t (&a)[4]) {
    const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
    for (int w = 0; w < 4; ++w) {
      const int row = thread() / 32 * 16 + g + w % 2 * 8, column = k + 2 * t + w / 2 * 8;
      a[w] = 0;
      for (int e = 0; e < 2; ++e) {
        if (row >= params.rows || column + e >= params.depth) continue;
        a[w] |= uint32_t{params.a_data[row * params.a_pitch + column + e]} << 16 * e;
      }
    }
  }

  static void multiply(const ProductParams& params, Shared* shared, int tiles,
                       float (&d)[kN / 8][4]) {
    constexpr int kStepOfA = kA == Major::kK ? 32 : 2048, kStepOfB = kB == Major::kK ? 32 : 2048;
    uint32_t registers[kDepth / 16][4];
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages;
      ptx::mbarrier_wait(&shared->full[stage], tile / kStages % 2);
      const uint64_t a =
          ptx::wgmma_descriptor(shared->a[stage] + group() * kPanelBytes, kPanelBytes, 1024);
      const uint64_t b = ptx::wgmma_descriptor(shared->b[stage], kPanelBytes, 1024);
      for (int i = 0; i < kDepth / 16 && kFromRegisters; ++i) {
        load_a(params, tile * kDepth + 16 * i, registers[i]);
      }
      ptx::wgmma_hold(d);
      ptx::wgmma_fence();
      for (int i = 0; i < kDepth / 16; ++i) {
        const uint64_t b_step = ptx::wgmma_advance(b, i * kStepOfB);
        const bool accumulate = tile > 0 || i > 0;
        if constexpr (kFromRegisters) {
          ptx::wgmma<kB, kN>(d, registers[i], b_step, accumulate, T{});
        } else {
          ptx::wgmma<kA, kB, kN>(d, ptx::wgmma_advance(a, i * kStepOfA), b_step, accumulate, T{});
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(d);
      if (thread() % ptx::kWarpgroupSize == 77) ptx::mbarrier_arrive(&shared->empty[stage]);
    }
  }

  // C by TMA, and the sums of its columns by bulk_add.
  static void store(const ProductParams& params, Shared* shared, const float (&d)[kN / 8][4]) {
    const int lane = ptx::lane_id(), warp = thread() % ptx::kWarpgroupSize / 32;
    float (*const c)[kN] = shared->c[group()];
    for (int n = 0; n < kN / 8; ++n) {
      for (int e = 0; e < 2; ++e) {
        float* const place = &c[16 * warp + lane / 4 + 8 * e][8 * n + 2 * (lane % 4)];
        ptx::store_shared(reinterpret_cast<float2*>(place),
                          make_float2(d[n][2 * e], d[n][2 * e + 1]));
      }
    }
    ptx::sync_named(1 + group(), ptx::kWarpgroupSize);
    for (int n = thread() % ptx::kWarpgroupSize; n < kN; n += ptx::kWarpgroupSize) {
      float sum = 0;
      for (int row = 0; row < 64; ++row) sum += ptx::load_shared(&c[row][n]);
      ptx::store_shared(&shared->sums[group()][n], sum);
    }
    ptx::fence_async_proxy();
    ptx::sync_named(1 + group(), ptx::kWarpgroupSize);
    if (thread() % ptx::kWarpgroupSize != 5) return;
    ptx::tma_store<2>(&params.c, {0, 64 * group()}, c);
    ptx::bulk_commit();
    ptx::bulk_add(params.sums, shared->sums[group()], kN * 4);
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
    ptx::store_shared(&c[0][0], 0.0f);
    ptx::bulk_wait<0>();
  }

  static void run(const __grid_constant__ ProductParams params) {
    auto* const shared = static_cast<Shared*>(ptx::shared_memory_1024());
    if (thread() == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(&shared->full[stage], 1);
        ptx::mbarrier_init(&shared->empty[stage], kGroups);
      }
      ptx::mbarrier_fence_init();
    }
    ptx::sync_block();
    const int tiles = (params.depth + kDepth - 1) / kDepth;
    if (group() == kGroups) return produce(params, shared, tiles);
    ptx::more_registers<232>();
    float d[kN / 8][4];
    multiply(params, shared, tiles, d);
    store(params, shared, d);
  }

  static bool is_right() {
    const DType dtype = std::is_same_v<T, bf16> ? DType::kBFloat16 : DType::kFloat16;
    const int rows = 117, depth = 260, columns = kN - 3;
    const Matrix<T> a(kA == Major::kK ? rows : depth, kA == Major::kK ? depth : rows);
    const Matrix<T> b(kB == Major::kK ? columns : depth, kB == Major::kK ? depth : columns);
    const Matrix<float> c(rows, columns), sums(1, kN);
    const auto a_at = [&](int m, int k) -> T& { return kA == Major::kK ? a.at(m, k) : a.at(k, m); };
    const auto b_at = [&](int k, int n) -> T& { return kB == Major::kK ? b.at(n, k) : b.at(k, n); };
    for (int k = 0; k < depth; ++k) {
      for (int m = 0; m < rows; ++m) a_at(m, k) = rounded<T>(number(m + 5 * k));
      for (int n = 0; n < columns; ++n) b_at(k, n) = rounded<T>(number(3 * n + 2 * k + 1));
    }
    for (int n = 0; n < kN; ++n) sums.at(0, n) = number(n);
    const int box_of_b = kB == Major::kK ? kN : kDepth;
    const ProductParams params = {a.map(dtype, 64, 64, true),
                                  b.map(dtype, 64, box_of_b, true),
                                  c.map(DType::kFloat32, kN, 64, false),
                                  reinterpret_cast<const uint16_t*>(a.data.get()),
                                  a.pitch,
                                  rows,
                                  depth,
                                  sums.data.get()};
    const auto error = cuda::launch(
        run,
        {1, (kGroups + 1) * ptx::kWarpgroupSize, sizeof(Shared) + ptx::kAlignmentSlack, nullptr},
        params);
    if (error != cudaSuccess) {
      puts(cudaGetErrorString(error));
      return false;
    }
    for (int n = 0; n < columns; ++n) {
      float total = number(n);
      for (int m = 0; m < rows; ++m) {
        float sum = 0;  // exact
        for (int k = 0; k < depth; ++k)
          sum += ptx::to_float(a_at(m, k)) * ptx::to_float(b_at(k, n));
        if (c.at(m, n) != sum) return false;
        total += sum;
      }
      if (sums.at(0, n) != total) return false;
    }
    return true;
  }
};

// ---- Boxes --------------------------------------------------------------------------------------

constexpr int kBox[4] = {8, 3, 2, 2}, kBoxFloats = 8 * 3 * 2 * 2;

// A box of four dimensions to global memory, in the order of its elements.
void copy_box(const __grid_constant__ TensorMap map, const int* at, float* out, const float* row) {
  auto* const box = static_cast<float*>(ptx::shared_memory());
  float* const second = box + 128;
  auto* const barrier = reinterpret_cast<Barrier*>(second + 128);
  if (thread() == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_fence_init();
    ptx::tma_load<4>(box, &map, {at[0], at[1], at[2], at[3]}, barrier);
    ptx::bulk_load(second, row, 64, barrier);
    ptx::mbarrier_expect(barrier, kBoxFloats * 4 + 64);
  }
  ptx::sync_block();
  ptx::mbarrier_wait(barrier, 0);
  if (thread() < kBoxFloats) out[thread()] = ptx::load_shared(box + thread());
  if (thread() < 16) out[kBoxFloats + thread()] = ptx::load_shared(second + thread());
}

bool boxes_are_right() {
  constexpr int kSizes[4] = {11, 4, 3, 5}, kPitches[4] = {1, 12, 48, 144};
  alignas(16) static float data[12 * 4 * 3 * 5], out[kBoxFloats + 16];
  for (int i = 0; i < 720; ++i) data[i] = static_cast<float>(i + 1);
  TensorMap map;
  const TensorBox tensor = {DType::kFloat32, 4,    data, {11, 4, 3, 5}, {48, 192, 576},
                            {8, 3, 2, 2},    false};
  if (cuda::encode_tensor_map(&map, tensor) != cudaSuccess) return false;
  constexpr int kPlaces[][4] = {
      {0, 0, 0, 0}, {3, 1, 1, 3}, {-3, 2, -1, 4}, {9, -2, 2, -1}, {11, 0, 0, 0}};
  for (const auto& at : kPlaces) {
    if (cuda::launch(copy_box, {1, kThreads, 4096, nullptr}, map, at, out, data) != cudaSuccess) {
      puts(cudaGetErrorString(cudaErrorLaunchFailure));
      return false;
    }
    for (int i = 0; i < kBoxFloats; ++i) {
      int rest = i, index = 0;
      bool is_inside = true;
      for (int d = 0; d < 4; ++d) {
        const int position = at[d] + rest % kBox[d];
        rest /= kBox[d];
        is_inside &= position >= 0 && position < kSizes[d];
        index += position * kPitches[d];
      }
      if (out[i] != (is_inside ? data[index] : 0.0f)) return false;
    }
    if (memcmp(out + kBoxFloats, data, 64) != 0) return false;
  }
  return true;
}

// ---- Named barriers -----------------------------------------------------------------------------

// The first half of the block tells the second one, which answers.
void converse(int* out) {
  auto* const words = static_cast<int*>(ptx::shared_memory());
  const int half = thread() / 64, own = thread() % 64;
  for (int round = 0; round < 4; ++round) {
    if (half == 0) {
      ptx::store_shared(words + own, 10 * round + own);
      ptx::arrive_named(1, kThreads);
      ptx::sync_named(2, kThreads);
      out[own] += ptx::load_shared(words + 64 + (own ^ 40));
    } else {
      ptx::sync_named(1, kThreads);
      const int heard = ptx::load_shared(words + (own ^ 33));
      ptx::store_shared(words + 64 + own, heard + 1);
      ptx::arrive_named(2, kThreads);
    }
  }
}

bool conversation_is_right() {
  int out[64] = {};
  const auto error = run(converse, out);
  if (error != cudaSuccess) puts(cudaGetErrorString(error));
  for (int i = 0; i < 64; ++i) {
    if (out[i] != 2 * (60 + 4 * ((i ^ 40 ^ 33) + 1))) return false;
  }
  return error == cudaSuccess;
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

void run_right_sm90_kernels() {
  using enum Major;
  cudaSetDevice(1);
  report("product K x K", with_all_seeds(Product<kK, kK, false, 80, bf16>::is_right));
  report("product K x MN", with_all_seeds(Product<kK, kMN, false, 128, f16>::is_right));
  report("product MN x K", with_all_seeds(Product<kMN, kK, false, 64, f16>::is_right));
  report("product MN x MN", with_all_seeds(Product<kMN, kMN, false, 96, bf16>::is_right));
  report("product registers x MN", with_all_seeds(Product<kK, kMN, true, 192, bf16>::is_right));
  report("product registers x K", with_all_seeds(Product<kK, kK, true, 16, f16>::is_right));
  report("boxes", with_all_seeds(boxes_are_right));
  report("conversation", with_all_seeds(conversation_is_right));
  cudaSetDevice(0);
}

}  // namespace fastattn::self_test
