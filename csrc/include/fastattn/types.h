// Storage types and small helpers of the seam. Compiles as C++ and as CUDA, under any -m flags: no
// torch, no STL.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Everything in a header that an ISA-specific unit may include has internal linkage: a weak symbol
// compiled with AVX-512 could be the copy that the linker keeps, and an older CPU would then die of
// SIGILL.
#if defined(__CUDACC__)
#define FA_INLINE static inline __host__ __device__
#elif defined(__GNUC__)
#define FA_INLINE static inline __attribute__((always_inline))
#else
#define FA_INLINE static inline
#endif

// In a function, before a loop over an array that is to stay in registers.
#if defined(__CUDACC__)
#define FA_UNROLL _Pragma("unroll")
#else
#define FA_UNROLL _Pragma("GCC unroll 16")
#endif

// For the rare paths of what is inlined.
#if defined(__GNUC__)
#define FA_NOINLINE static __attribute__((noinline))
#else
#define FA_NOINLINE static
#endif

namespace fastattn {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

enum class Status : int32_t {
  kOk,
  kOutOfMemory,  // the workspace could not be allocated
  kNotBuilt,     // this build has no kernel for the request
  kLaunchFailed  // the device refused the launch
};

// Bit patterns; conversions belong to the vec vocabulary of each level.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename T>
FA_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
FA_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}

FA_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

FA_INLINE int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

FA_INLINE size_t dtype_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace fastattn
