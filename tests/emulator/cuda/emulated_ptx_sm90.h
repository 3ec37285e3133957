// csrc/cuda/ptx_sm90.cuh on the emulator: the same functions, each doing what its instruction does.
#pragma once

#include "bulk_stores.h"
#include "mbarriers.h"
#include "named_barriers.h"
#include "products.h"
#include "register_pool.h"
#include "tensor_maps.h"
#include "turns.h"

namespace fastattn::cuda::ptx {

// ---- Barriers in shared memory ------------------------------------------------------------------

inline void mbarrier_init(Barrier* barrier, int arrivals, Where where = Where::current()) {
  emulator::mbarriers.init(barrier, arrivals, where);
}

inline void mbarrier_fence_init() {
  emulator::mbarriers.fence_init();
}

inline void mbarrier_arrive(Barrier* barrier, Where where = Where::current()) {
  emulator::mbarriers.arrive(barrier, 0, "mbarrier_arrive", where);
}

inline void mbarrier_expect(Barrier* barrier, int bytes, Where where = Where::current()) {
  emulator::mbarriers.arrive(barrier, bytes, "mbarrier_expect", where);
}

inline void mbarrier_wait(Barrier* barrier, int parity, Where where = Where::current()) {
  emulator::mbarriers.wait(barrier, parity, where);
}

// ---- TMA ----------------------------------------------------------------------------------------

inline void fence_async_proxy() {
  emulator::block.use_order();
  emulator::block.current().beyond->fences.push_back(emulator::block.now());
}

inline void tma_prefetch_map(const TensorMap*) {}

template <int kRank>
inline void tma_load(void* shared, const TensorMap* map, const int (&coordinates)[kRank],
                     Barrier* barrier, Where where = Where::current()) {
  static_assert(kRank >= 2 && kRank <= 5);
  emulator::mbarriers.load(emulator::transfer_of(shared, map, kRank, coordinates, where), barrier,
                           where);
}

template <int kRank>
inline void tma_store(const TensorMap* map, const int (&coordinates)[kRank], const void* shared,
                      Where where = Where::current()) {
  static_assert(kRank >= 2 && kRank <= 5);
  emulator::block.current().beyond->stores.issue(
      emulator::transfer_of(shared, map, kRank, coordinates, where), false, where);
}

inline void bulk_load(void* shared, const void* global, int bytes, Barrier* barrier,
                      Where where = Where::current()) {
  emulator::mbarriers.load(emulator::transfer_of(shared, global, bytes, where), barrier, where);
}

inline void bulk_add(float* global, const void* shared, int bytes, Where where = Where::current()) {
  emulator::block.current().beyond->stores.issue(
      emulator::transfer_of(shared, global, bytes, where), true, where);
}

inline void bulk_commit() {
  emulator::block.current().beyond->stores.commit();
}

template <int kPending>
inline void bulk_wait_read() {
  emulator::block.current().beyond->stores.wait(kPending, true);
}

template <int kPending>
inline void bulk_wait() {
  emulator::block.current().beyond->stores.wait(kPending, false);
}

// ---- Blocks of a kernel
// --------------------------------------------------------------------------

inline uint32_t fetch_add(uint32_t* global, uint32_t value) {
  emulator::block.use_order();
  return emulator::turns.fetch_add(global, value);
}

inline void release_global(uint32_t* global, uint32_t value) {
  emulator::block.use_order();
  emulator::turns.release(global, value);
}

inline void await_global(const uint32_t* global, uint32_t least, Where where = Where::current()) {
  emulator::block.use_order();
  emulator::turns.await(global, least, where);
}

// ---- Warps of a block ---------------------------------------------------------------------------

inline void sync_named(int id, int threads, Where where = Where::current()) {
  emulator::named_barriers.sync(id, threads, where);
}

inline bool sync_named_or(int id, int threads, bool predicate, Where where = Where::current()) {
  return emulator::named_barriers.sync_or(id, threads, predicate, where);
}

inline void arrive_named(int id, int threads, Where where = Where::current()) {
  emulator::named_barriers.arrive(id, threads, where);
}

template <int kRegisters>
inline void more_registers(Where where = Where::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::register_pool.demand(kRegisters, where);
}

template <int kRegisters>
inline void fewer_registers(Where where = Where::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::register_pool.give_up(kRegisters, where);
}

// ---- Products of a warpgroup --------------------------------------------------------------------

inline emulator::Products& products() {
  return emulator::products_of(emulator::block.current());
}

inline void wgmma_fence(Where where = Where::current()) {
  static constexpr Operation kOperation = {"wgmma_fence", false,
                                           [](void* const*) { products().fence(); }};
  emulator::block.join_group(kOperation, nullptr, where);
}

inline void wgmma_commit(Where where = Where::current()) {
  static constexpr Operation kOperation = {"wgmma_commit", false,
                                           [](void* const*) { products().commit(); }};
  emulator::block.join_group(kOperation, nullptr, where);
}

template <int kPending>
inline void wgmma_wait(Where where = Where::current()) {
  static_assert(kPending >= 0 && kPending <= 7);
  static constexpr Operation kOperation = {
      "wgmma_wait", false,
      [](void* const*) { products().wait(kPending, emulator::block.current().where); }};
  emulator::block.join_group(kOperation, nullptr, where);
}

template <int kN>
inline void wgmma_hold(float (&)[kN][4]) {}

template <typename T>
inline double number_of(uint16_t bits) {
  return static_cast<double>(to_float(T{bits}));
}

template <bool kAlongM, Major kB, int kN, typename T>
inline void issue_wgmma(const emulator::WgmmaOperands& operands, const Where& where) {
  static_assert(kN % 16 == 0 && kN >= 16 && kN <= 256);
  static constexpr Operation kOperation = {
      "wgmma", false, [](void* const* given) {
        static constexpr emulator::WgmmaKind kKind = {kN, kAlongM, kB == Major::kMN, number_of<T>};
        products().issue(kKind, given, emulator::block.current().where);
      }};
  emulator::WgmmaOperands own = operands;
  emulator::block.join_group(kOperation, &own, where);
}

template <Major kA, Major kB, int kN, typename T>
inline void wgmma(float (&d)[kN / 8][4], uint64_t a, uint64_t b, bool accumulate, T,
                  Where where = Where::current()) {
  issue_wgmma<kA == Major::kMN, kB, kN, T>({&d[0][0], nullptr, a, b, accumulate}, where);
}

template <Major kB, int kN, typename T>
inline void wgmma(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, T,
                  Where where = Where::current()) {
  issue_wgmma<false, kB, kN, T>({&d[0][0], a, 0, b, accumulate}, where);
}

}  // namespace fastattn::cuda::ptx
