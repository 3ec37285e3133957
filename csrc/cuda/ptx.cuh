// With ptx_sm90.cuh the only CUDA files that have asm: one function per instruction, named after
// what it does. Kernels touch shared memory, other threads and the matrix units through these
// functions alone, so that the emulator (tests/emulator/cuda), which has functions of the same
// names, sees all that matters.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "fastattn/types.h"

namespace fastattn::cuda::ptx {

constexpr int kWarpSize = 32;

}  // namespace fastattn::cuda::ptx

#ifdef FASTATTN_CUDA_EMULATE
#include <emulated_ptx.h>
#else

#define FA_DEVICE __device__ __forceinline__
// On a kernel: at most so many threads a block, and at least so many blocks on a multiprocessor.
#define FA_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)

namespace fastattn::cuda::ptx {

// The architecture that this code was compiled for: 800, 900, ...
FA_DEVICE uint32_t compiled_arch() {
#ifdef __CUDA_ARCH__
  return __CUDA_ARCH__;
#else
  return 0;
#endif
}

// This thread's place in its warp.
FA_DEVICE int lane_id() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// ---- Shared memory ------------------------------------------------------------------------------

// The dynamic shared memory of the block, 128-byte aligned.
FA_DEVICE void* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// The 32-bit address that instructions take: a byte offset.
FA_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 1 to 16 bytes, naturally aligned.
template <typename T>
FA_DEVICE T load_shared(const T* pointer) {
  return *pointer;
}

template <typename T>
FA_DEVICE T load_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

template <typename T>
FA_DEVICE void store_shared(T* pointer, T value) {
  *pointer = value;
}

template <typename T>
FA_DEVICE void store_shared(uint32_t address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: lane 8m + r names row r (16 bytes, at a shared_address)
// of matrix m; lane 4r + c receives, in x[m], elements 2c and 2c + 1 of that row.
FA_DEVICE void ldmatrix_x4(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// The same, with each matrix transposed: lane 4r + c receives elements r of rows 2c and 2c + 1.
FA_DEVICE void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// cp.async.cg.shared.global: 16 bytes to shared memory, of which the first `bytes` come from global
// memory and the rest are zero. They are there when a wait for their group has returned; until
// then nobody may touch them.
FA_DEVICE void cp_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

FA_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
  cp_async_16(shared_address(shared), global, bytes);
}

// cp.async.commit_group: what this thread has issued since the last commit is a group.
FA_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group: all but the newest kPending groups of this thread have arrived.
template <int kPending>
FA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrix units -------------------------------------------------------------------------------

// mma.sync.aligned.m16n8k16: d += a b in float32. With g = lane / 4 and t = lane % 4, a lane holds
//   d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)                       of 16 x 8
//   a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..), two each     of 16 x 16
//   b: (2t.., g) (2t+8.., g), two each                               of 16 x 8
FA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Arithmetic ---------------------------------------------------------------------------------

// ex2.approx.ftz.f32: 2^x within 2 ulp; 2^-inf is 0.
FA_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx.ftz.f32: 1 / x within 1 ulp.
FA_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to nearest even into one word, the first in the low half.
FA_DEVICE uint32_t pack(float low, float high, bf16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

FA_DEVICE uint32_t pack(float low, float high, f16) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

FA_DEVICE float to_float(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

FA_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// ---- Other threads ------------------------------------------------------------------------------

// All threads of the block have arrived, and what they wrote to shared memory is visible to all.
FA_DEVICE void sync_block() {
  __syncthreads();
}

// The same, and whether `predicate` holds in any of them.
FA_DEVICE bool sync_block_or(bool predicate) {
  return __syncthreads_or(predicate) != 0;
}

// The same among the threads of a warp.
FA_DEVICE void sync_warp() {
  __syncwarp();
}

// The value that lane (lane ^ mask) gives; all lanes of the warp take part in this and the next
// ones.
template <typename T>
FA_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value that lane `source` gives.
template <typename T>
FA_DEVICE T shuffle(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

FA_DEVICE bool any_in_warp(bool predicate) {
  return __any_sync(0xffffffffu, predicate) != 0;
}

// red.global.add.f32
FA_DEVICE void add_to_global(float* pointer, float value) {
  asm volatile("red.global.add.f32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(pointer)), "f"(value)
               : "memory");
}

}  // namespace fastattn::cuda::ptx

#endif  // FASTATTN_CUDA_EMULATE
