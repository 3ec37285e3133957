// csrc/cuda/ptx.cuh on the emulator: the same functions, each doing what its instruction does.
#pragma once

#include <stdint.h>
#include <string.h>

#include "block.h"
#include "launch.h"
#include "matrices.h"
#include "shared_memory.h"

#define FA_DEVICE inline
#define FA_KERNEL(threads, blocks)

namespace fastattn::cuda::ptx {

using emulator::Operation, emulator::Where;

inline uint32_t compiled_arch() {
  return 10 * static_cast<uint32_t>(emulator::running_arch());
}

inline int lane_id() {
  return emulator::block.current().lane;
}

// ---- Shared memory ------------------------------------------------------------------------------

inline void* shared_memory() {
  return emulator::shared.data();
}

inline uint32_t shared_address(const void* pointer) {
  return emulator::shared.address_of(pointer);
}

template <typename T>
inline T load_shared(const T* pointer, Where where = Where::current()) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  emulator::shared.read(pointer, sizeof(T), where);
  T value;
  memcpy(&value, pointer, sizeof(T));
  return value;
}

template <typename T>
inline T load_shared(uint32_t address, Where where = Where::current()) {
  const void* pointer = emulator::shared.pointer_to(address);
  return load_shared(static_cast<const T*>(pointer), where);
}

template <typename T>
inline void store_shared(T* pointer, T value, Where where = Where::current()) {
  static_assert(sizeof(T) >= 2, "two threads that store one byte each would look like a race");
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  emulator::shared.write(pointer, sizeof(T), where);
  memcpy(pointer, &value, sizeof(T));
}

template <typename T>
inline void store_shared(uint32_t address, T value, Where where = Where::current()) {
  void* pointer = const_cast<void*>(emulator::shared.pointer_to(address));
  store_shared(static_cast<T*>(pointer), value, where);
}

inline void ldmatrix_x4(uint32_t (&x)[4], uint32_t address, Where where = Where::current()) {
  const void* const row = emulator::shared.pointer_to(address);
  static constexpr Operation kOperation = {"ldmatrix_x4", false, emulator::load_matrices};
  emulator::shared.read_by_warp(row, 16, where);
  emulator::LdmatrixOperands operands = {x, row};
  emulator::block.join_warp(kOperation, &operands, where);
}

inline void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t address, Where where = Where::current()) {
  const void* const row = emulator::shared.pointer_to(address);
  static constexpr Operation kOperation = {"ldmatrix_x4_trans", false,
                                           emulator::load_transposed_matrices};
  emulator::shared.read_by_warp(row, 16, where);
  emulator::LdmatrixOperands operands = {x, row};
  emulator::block.join_warp(kOperation, &operands, where);
}

inline void cp_async_16(void* shared, const void* global, int bytes,
                        Where where = Where::current()) {
  emulator::block.current().copies.issue(shared, global, bytes, where);
}

inline void cp_async_16(uint32_t address, const void* global, int bytes,
                        Where where = Where::current()) {
  cp_async_16(const_cast<void*>(emulator::shared.pointer_to(address)), global, bytes, where);
}

inline void cp_async_commit() {
  emulator::block.current().copies.commit();
}

template <int kPending>
inline void cp_async_wait(Where where = Where::current()) {
  emulator::block.current().copies.wait(kPending, where);
}

// ---- Matrix units -------------------------------------------------------------------------------

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T,
                         Where where = Where::current()) {
  static constexpr Operation kOperation = {"mma_m16n8k16", false, emulator::multiply_matrices<T>};
  emulator::MmaOperands operands = {d, a, {b0, b1}};
  emulator::block.join_warp(kOperation, &operands, where);
}

// ---- Arithmetic ---------------------------------------------------------------------------------

// Subnormal numbers are 0, coming and going.
inline float exp2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// One off in the last place, as the instruction may be.
inline float reciprocal(float x) {
  const float y = 1.0f / x;
  if (fabsf(y) < 0x1p-126f) return copysignf(0.0f, y);
  return isinf(y) ? y : nextafterf(y, 0.0f);
}

template <typename T>
inline uint32_t pack(float low, float high, T) {
  return emulator::rounded_bits(low, T{}) | emulator::rounded_bits(high, T{}) << 16;
}

using emulator::to_float;

// ---- Other threads ------------------------------------------------------------------------------

inline void sync_block(Where where = Where::current()) {
  static constexpr Operation kOperation = {"sync_block", true, nullptr};
  emulator::block.join_block(kOperation, false, where);
}

inline bool sync_block_or(bool predicate, Where where = Where::current()) {
  static constexpr Operation kOperation = {"sync_block_or", true, nullptr};
  return emulator::block.join_block(kOperation, predicate, where);
}

inline void sync_warp(Where where = Where::current()) {
  static constexpr Operation kOperation = {"sync_warp", true, nullptr};
  emulator::block.join_warp(kOperation, nullptr, where);
}

template <typename T>
struct ShuffleOperands {
  T value;
  int source;
  T result;

  static void run(void* const* operands) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      auto& own = *static_cast<ShuffleOperands*>(operands[lane]);
      own.result = static_cast<const ShuffleOperands*>(operands[own.source])->value;
    }
  }
};

template <typename T>
inline T shuffle_xor(T value, int mask, Where where = Where::current()) {
  static constexpr Operation kOperation = {"shuffle_xor", false, ShuffleOperands<T>::run};
  ShuffleOperands<T> operands = {value, (lane_id() ^ mask) % kWarpSize, value};
  emulator::block.join_warp(kOperation, &operands, where);
  return operands.result;
}

template <typename T>
inline T shuffle(T value, int source, Where where = Where::current()) {
  static constexpr Operation kOperation = {"shuffle", false, ShuffleOperands<T>::run};
  ShuffleOperands<T> operands = {value, source & (kWarpSize - 1), value};
  emulator::block.join_warp(kOperation, &operands, where);
  return operands.result;
}

inline void any_of_lanes(void* const* operands) {
  bool any = false;
  for (int lane = 0; lane < kWarpSize; ++lane) any |= *static_cast<const bool*>(operands[lane]);
  for (int lane = 0; lane < kWarpSize; ++lane) *static_cast<bool*>(operands[lane]) = any;
}

inline bool any_in_warp(bool predicate, Where where = Where::current()) {
  static constexpr Operation kOperation = {"any_in_warp", false, any_of_lanes};
  emulator::block.join_warp(kOperation, &predicate, where);
  return predicate;
}

// One thread runs at a time.
inline void add_to_global(float* pointer, float value) {
  *pointer += value;
}

}  // namespace fastattn::cuda::ptx
