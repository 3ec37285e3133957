// What sm_90a alone has, one function per instruction as in ptx.cuh: barriers in shared memory that
// count arrivals and bytes, TMA, and products by a warpgroup. Only units of inst/ whose names end
// in _sm90.cu include it.
#pragma once

#include "ptx.cuh"
#include "tensor_map.h"

namespace fastattn::cuda::ptx {

constexpr int kWarpgroupSize = 128;

// An mbarrier, in shared memory. Its phases count from 0; a phase is complete when all arrivals and
// all bytes that were announced are there.
using Barrier = uint64_t;

// Which dimension of an operand of wgmma is contiguous in shared memory: that of the sum, or its
// own (the rows of A, the columns of B).
enum class Major { kK, kMN };

}  // namespace fastattn::cuda::ptx

#ifdef FASTATTN_CUDA_EMULATE
#include <emulated_ptx_sm90.h>
#else

namespace fastattn::cuda::ptx {

// ---- Barriers in shared memory ------------------------------------------------------------------

// mbarrier.init: a phase takes so many arrivals.
FA_DEVICE void mbarrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// fence.mbarrier_init: what this thread has initialised is visible to copies. Other threads need
// sync_block besides.
FA_DEVICE void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive: one arrival. What this thread has done before is visible to whoever has waited
// for the phase.
FA_DEVICE void mbarrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
}

// mbarrier.arrive.expect_tx: one arrival, and `bytes` that copies will bring in this phase.
FA_DEVICE void mbarrier_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity: until the newest phase of this parity is complete. Before phase 0 the
// one of parity 1 counts as complete. NOTE: one that is two phases behind waits for the wrong one.
FA_DEVICE void mbarrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
}

// ---- TMA ----------------------------------------------------------------------------------------

// fence.proxy.async: what this thread has stored to shared memory is visible to TMA and wgmma. Each
// thread that has stored calls it, before the barrier that orders the copy or product.
FA_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// prefetch.tensormap
FA_DEVICE void tma_prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#define FA_TMA_LOAD(rank, where, ...)                                                             \
  asm volatile("cp.async.bulk.tensor." rank                                                       \
               ".shared::cluster.global.mbarrier::complete_tx::bytes "                            \
               "[%0], [%1, {" where "}], [%2];"                                                   \
               :                                                                                  \
               : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), __VA_ARGS__ \
               : "memory")
#define FA_TMA_STORE(rank, where, ...)                              \
  asm volatile("cp.async.bulk.tensor." rank                         \
               ".global.shared::cta.bulk_group "                    \
               "[%0, {" where "}], [%1];"                           \
               :                                                    \
               : "l"(map), "r"(shared_address(shared)), __VA_ARGS__ \
               : "memory")

// cp.async.bulk.tensor: the box of the map whose first element has these coordinates, in elements,
// the contiguous dimension first. What lies outside of the tensor is zero. The barrier receives the
// bytes of the whole box. Shared memory is 128-byte aligned, with a swizzle 1024-byte.
template <int kRank>
FA_DEVICE void tma_load(void* shared, const TensorMap* map, const int (&coordinates)[kRank],
                        Barrier* barrier) {
  static_assert(kRank >= 2 && kRank <= 5);
  const int (&c)[kRank] = coordinates;
  if constexpr (kRank == 2) {
    FA_TMA_LOAD("2d", "%3, %4", "r"(c[0]), "r"(c[1]));
  } else if constexpr (kRank == 3) {
    FA_TMA_LOAD("3d", "%3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  } else if constexpr (kRank == 4) {
    FA_TMA_LOAD("4d", "%3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  } else {
    FA_TMA_LOAD("5d", "%3, %4, %5, %6, %7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
  }
}

// The other way; what lies outside of the tensor is not written.
template <int kRank>
FA_DEVICE void tma_store(const TensorMap* map, const int (&coordinates)[kRank],
                         const void* shared) {
  static_assert(kRank >= 2 && kRank <= 5);
  const int (&c)[kRank] = coordinates;
  if constexpr (kRank == 2) {
    FA_TMA_STORE("2d", "%2, %3", "r"(c[0]), "r"(c[1]));
  } else if constexpr (kRank == 3) {
    FA_TMA_STORE("3d", "%2, %3, %4", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  } else if constexpr (kRank == 4) {
    FA_TMA_STORE("4d", "%2, %3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  } else {
    FA_TMA_STORE("5d", "%2, %3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
  }
}

#undef FA_TMA_LOAD
#undef FA_TMA_STORE

// cp.async.bulk: `bytes` in a row. They and both addresses are multiples of 16.
FA_DEVICE void bulk_load(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes),
        "r"(shared_address(barrier))
      : "memory");
}

// cp.reduce.async.bulk: global[i] += shared[i], one by one atomically. `bytes` and both addresses
// are multiples of 16.
FA_DEVICE void bulk_add(float* global, const void* shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// cp.async.bulk.commit_group: the stores and sums that this thread has issued since the last commit
// are a group.
FA_DEVICE void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// cp.async.bulk.wait_group.read: of all but the newest kPending groups of this thread, shared
// memory has been read.
template <int kPending>
FA_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group: and they are visible in global memory.
template <int kPending>
FA_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Blocks of a kernel
// --------------------------------------------------------------------------

// atom.global.add.u32: the number before.
FA_DEVICE uint32_t fetch_add(uint32_t* global, uint32_t value) {
  uint32_t before;
  asm volatile("atom.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(global)), "r"(value)
               : "memory");
  return before;
}

// st.release.gpu: what this thread has done, and what of copies and sums it has waited for, is
// visible to whoever finds this number.
FA_DEVICE void release_global(uint32_t* global, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(value)
               : "memory");
}

// ld.acquire.gpu, until the number is not less than `least`; fence.proxy.async: for copies and sums
// of this thread too.
FA_DEVICE void await_global(const uint32_t* global, uint32_t least) {
  asm volatile(
      "{\n"
      ".reg .u32 found;\n"
      ".reg .pred waits;\n"
      "again:\n"
      "ld.acquire.gpu.global.u32 found, [%0];\n"
      "setp.lt.u32 waits, found, %1;\n"
      "@waits bra again;\n"
      "fence.proxy.async.global;\n"
      "}"
      :
      : "l"(__cvta_generic_to_global(global)), "r"(least)
      : "memory");
}

// ---- Warps of a block ---------------------------------------------------------------------------

// bar.sync: as sync_block, among `threads`, whole warps; `id` is 1 to 15 (sync_block has 0).
FA_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.red.or: the same, and whether `predicate` holds in any of the threads.
FA_DEVICE bool sync_named_or(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred own, any;\n"
      "setp.ne.b32 own, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, own;\n"
      "selp.b32 %0, 1, 0, any;\n"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return any != 0;
}

// bar.arrive: the same without waiting for others. `threads` counts both kinds.
FA_DEVICE void arrive_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// setmaxnreg: all warps of a warpgroup have so many registers a thread from here on, a multiple of
// 8, 24 to 256. More are waited for until others have given them up.
template <int kRegisters>
FA_DEVICE void more_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
FA_DEVICE void fewer_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Products of a warpgroup --------------------------------------------------------------------

// wgmma.fence: products may touch registers that this thread has written before. Not needed between
// products into the same accumulators.
FA_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group: the products since the last commit are a group.
FA_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group: all but the newest kPending groups are done; until then nobody touches their
// registers and operands.
template <int kPending>
FA_DEVICE void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7);
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: the compiler keeps what writes these registers before this place and what reads
// them behind it. It does not know that products are under way between wgmma and wgmma_wait.
template <int kN>
FA_DEVICE void wgmma_hold(float (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
  }
}

// The operands of asm in groups of 8 registers, which is 16 columns of d.
#define FA_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
// clang-format off
#define FA_D_1 FA_D(0), FA_D(1)
#define FA_D_2 FA_D_1, FA_D(2), FA_D(3)
#define FA_D_3 FA_D_2, FA_D(4), FA_D(5)
#define FA_D_4 FA_D_3, FA_D(6), FA_D(7)
#define FA_D_5 FA_D_4, FA_D(8), FA_D(9)
#define FA_D_6 FA_D_5, FA_D(10), FA_D(11)
#define FA_D_7 FA_D_6, FA_D(12), FA_D(13)
#define FA_D_8 FA_D_7, FA_D(14), FA_D(15)
#define FA_D_9 FA_D_8, FA_D(16), FA_D(17)
#define FA_D_10 FA_D_9, FA_D(18), FA_D(19)
#define FA_D_11 FA_D_10, FA_D(20), FA_D(21)
#define FA_D_12 FA_D_11, FA_D(22), FA_D(23)
#define FA_D_13 FA_D_12, FA_D(24), FA_D(25)
#define FA_D_14 FA_D_13, FA_D(26), FA_D(27)
#define FA_D_15 FA_D_14, FA_D(28), FA_D(29)
#define FA_D_16 FA_D_15, FA_D(30), FA_D(31)
#define FA_NAMES_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FA_NAMES_2 FA_NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FA_NAMES_3 FA_NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FA_NAMES_4 FA_NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FA_NAMES_5 FA_NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FA_NAMES_6 FA_NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FA_NAMES_7 FA_NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FA_NAMES_8 FA_NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FA_NAMES_9 FA_NAMES_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FA_NAMES_10 FA_NAMES_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FA_NAMES_11 FA_NAMES_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FA_NAMES_12 FA_NAMES_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FA_NAMES_13 FA_NAMES_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FA_NAMES_14 FA_NAMES_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FA_NAMES_15 FA_NAMES_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FA_NAMES_16 FA_NAMES_15 ", %120, %121, %122, %123, %124, %125, %126, %127"

// What follows the registers of d is numbered from there on. Per width kN: the groups, and the next
// seven names.
#define FA_WIDTHS(form, T) \
  form(T, 16, 1, "%8", "%9", "%10", "%11", "%12", "%13", "%14") \
  form(T, 32, 2, "%16", "%17", "%18", "%19", "%20", "%21", "%22") \
  form(T, 48, 3, "%24", "%25", "%26", "%27", "%28", "%29", "%30") \
  form(T, 64, 4, "%32", "%33", "%34", "%35", "%36", "%37", "%38") \
  form(T, 80, 5, "%40", "%41", "%42", "%43", "%44", "%45", "%46") \
  form(T, 96, 6, "%48", "%49", "%50", "%51", "%52", "%53", "%54") \
  form(T, 112, 7, "%56", "%57", "%58", "%59", "%60", "%61", "%62") \
  form(T, 128, 8, "%64", "%65", "%66", "%67", "%68", "%69", "%70") \
  form(T, 144, 9, "%72", "%73", "%74", "%75", "%76", "%77", "%78") \
  form(T, 160, 10, "%80", "%81", "%82", "%83", "%84", "%85", "%86") \
  form(T, 176, 11, "%88", "%89", "%90", "%91", "%92", "%93", "%94") \
  form(T, 192, 12, "%96", "%97", "%98", "%99", "%100", "%101", "%102") \
  form(T, 208, 13, "%104", "%105", "%106", "%107", "%108", "%109", "%110") \
  form(T, 224, 14, "%112", "%113", "%114", "%115", "%116", "%117", "%118") \
  form(T, 240, 15, "%120", "%121", "%122", "%123", "%124", "%125", "%126") \
  form(T, 256, 16, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
// clang-format on

#define FA_WGMMA(N, T) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." T "." T " "
#define FA_PREDICATE(name) "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, " name ", 0;\n"
// The ones are signs of A and B.
#define FA_FROM_SHARED(T, N, G, A, B, P, MA, MB, X, Y)                                           \
  if constexpr (kN == N) {                                                                       \
    asm volatile(FA_PREDICATE(P) FA_WGMMA(N, T) "{" FA_NAMES_##G                                 \
                 "}, " A ", " B ", accumulates, 1, 1, " MA ", " MB ";\n}"                        \
                 : FA_D_##G                                                                      \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)), \
                   "n"(static_cast<int>(kB)));                                                   \
  }
#define FA_FROM_REGISTERS(T, N, G, A0, A1, A2, A3, B, P, MB)                                 \
  if constexpr (kN == N) {                                                                   \
    asm volatile(FA_PREDICATE(P) FA_WGMMA(N, T) "{" FA_NAMES_##G                             \
                 "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", accumulates, 1, 1, " MB ";\n}" \
                 : FA_D_##G                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                       \
                   "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kB)));            \
  }

template <typename T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// wgmma.mma_async.sync.aligned.m64nNk16: d (+)= a b in float32, by four warps whose first is a
// multiple of 4. With g = lane / 4 and t = lane % 4, lane of warp w holds in d[n] the elements
//   (16w + g, 8n + 2t) (16w + g, 8n + 2t+1) (16w + g+8, 8n + 2t) (16w + g+8, 8n + 2t+1).
// a and b are descriptors of operands in shared memory, 64 x 16 and 16 x kN.
template <Major kA, Major kB, int kN, typename T>
FA_DEVICE void wgmma(float (&d)[kN / 8][4], uint64_t a, uint64_t b, bool accumulate, T) {
  static_assert(kN % 16 == 0 && kN >= 16 && kN <= 256);
  if constexpr (kIsBf16<T>) {
    FA_WIDTHS(FA_FROM_SHARED, "bf16")
  } else {
    FA_WIDTHS(FA_FROM_SHARED, "f16")
  }
}

// The same with A in registers: of each warp its 16 rows, as mma_m16n8k16's a.
template <Major kB, int kN, typename T>
FA_DEVICE void wgmma(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                     T) {
  static_assert(kN % 16 == 0 && kN >= 16 && kN <= 256);
  if constexpr (kIsBf16<T>) {
    FA_WIDTHS(FA_FROM_REGISTERS, "bf16")
  } else {
    FA_WIDTHS(FA_FROM_REGISTERS, "f16")
  }
}

#undef FA_WIDTHS
#undef FA_WGMMA
#undef FA_PREDICATE
#undef FA_FROM_SHARED
#undef FA_FROM_REGISTERS

}  // namespace fastattn::cuda::ptx

#endif  // FASTATTN_CUDA_EMULATE

namespace fastattn::cuda::ptx {

// The dynamic shared memory of the block, 1024-byte aligned as the swizzle needs it: ask for
// kAlignmentSlack bytes more.
constexpr int kAlignmentSlack = 1024 - 128;
FA_DEVICE void* shared_memory_1024() {
  auto* const memory = static_cast<unsigned char*>(shared_memory());
  return memory + (0u - shared_address(memory)) % 1024;
}

// Describes an operand in shared memory to wgmma, as TMA brings it with the swizzle: rows of 64
// elements, 128 bytes apart, whose 16-byte chunks are permuted by (row % 8). Such a panel is 1024-
// byte aligned, and so are both strides.
//   Major::kK:  a row of a panel is a row of A (a column of B), along it runs k. `stride` is from 8
//               rows to the next 8: 1024. `leading` means nothing: 0.
//               The next 16 of k: 32 bytes further, in the next panel after four.
//   Major::kMN: a row of a panel has one k, along it run 64 rows of A (columns of B). `stride` is
//               from 8 values of k to the next 8: 1024. `leading` is from one panel to the next, of
//               64 more rows of A (columns of B); it means nothing where there are only 64.
//               The next 16 of k: 2048 bytes further.
//               NOTE: a kN that ends within a panel (80, 96) is what this layout implies, but
//               public kernels take narrower swizzles there, and none is known to rely on it.
FA_DEVICE uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  const auto field = [](uint32_t bytes) { return uint64_t{bytes >> 4 & 0x3fff}; };
  return field(shared_address(shared)) | field(static_cast<uint32_t>(leading_bytes)) << 16 |
         field(static_cast<uint32_t>(stride_bytes)) << 32 | kSwizzle128 << 62;
}

// The same operand, so many bytes further.
FA_DEVICE uint64_t wgmma_advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace fastattn::cuda::ptx
