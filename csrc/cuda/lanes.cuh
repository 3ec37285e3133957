// The vec vocabulary of csrc/cpu/vec_scalar.h for a thread of a GPU, as far as accurate_math.inc
// speaks it: a few float32 numbers side by side, whose chains of instructions fill each other's
// waits.
#pragma once

#include "ptx.cuh"

namespace fastattn::cuda {

template <int kCount>
struct Lanes {
  using Real = float;
  float lane[kCount];

  static FA_DEVICE Lanes broadcast(float x) {
    Lanes result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.lane[i] = x;
    return result;
  }
  static FA_DEVICE Lanes zero() {
    return broadcast(0.0f);
  }
};

// NOTE: the intrinsics with _rn are what the compiler does not merge into others.
#define FA_LANES(name, parameters, expression)           \
  template <int kCount>                                  \
  FA_DEVICE Lanes<kCount> name parameters {              \
    Lanes<kCount> result;                                \
    _Pragma("unroll") for (int i = 0; i < kCount; ++i) { \
      result.lane[i] = expression;                       \
    }                                                    \
    return result;                                       \
  }
#define FA_LANES_1(name, expression) FA_LANES(name, (const Lanes<kCount>& a), expression)
#define FA_LANES_2(name, expression) \
  FA_LANES(name, (const Lanes<kCount>& a, const Lanes<kCount>& b), expression)
#define FA_LANES_3(name, expression)                                                       \
  FA_LANES(name, (const Lanes<kCount>& a, const Lanes<kCount>& b, const Lanes<kCount>& c), \
           expression)

FA_LANES_2(add, __fadd_rn(a.lane[i], b.lane[i]))
FA_LANES_2(sub, __fadd_rn(a.lane[i], -b.lane[i]))
FA_LANES_2(mul, __fmul_rn(a.lane[i], b.lane[i]))
FA_LANES_2(div, __fmul_rn(a.lane[i], ptx::reciprocal(b.lane[i])))
FA_LANES_2(min, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i])
FA_LANES_1(magnitude_of, fabsf(a.lane[i]))
FA_LANES_3(fma, __fmaf_rn(a.lane[i], b.lane[i], c.lane[i]))
FA_LANES_3(fused, __fmaf_rn(a.lane[i], b.lane[i], c.lane[i]))
FA_LANES_3(fused_minus, __fmaf_rn(a.lane[i], b.lane[i], -c.lane[i]))
FA_LANES_3(minus_fused, __fmaf_rn(-b.lane[i], c.lane[i], a.lane[i]))

// 1.5 * 2^23 leaves no fraction bits, and n in the lowest bits of n + it.
constexpr float kIntegers = 12582912.0f;
FA_LANES_1(round_nearest, __fadd_rn(__fadd_rn(a.lane[i], kIntegers), -kIntegers))
FA_LANES_1(pow2_integral,
           __uint_as_float(__float_as_uint(__fadd_rn(a.lane[i], kIntegers + 127.0f)) << 23))
#undef FA_LANES_1
#undef FA_LANES_2
#undef FA_LANES_3
#undef FA_LANES

template <int kCount>
FA_DEVICE Lanes<kCount> select_less(const Lanes<kCount>& a, const Lanes<kCount>& b,
                                    const Lanes<kCount>& x, const Lanes<kCount>& y) {
  Lanes<kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    result.lane[i] = a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i];
  }
  return result;
}

template <int kCount>
FA_DEVICE bool all_less(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  bool result = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result &= a.lane[i] < b.lane[i];
  return result;
}

}  // namespace fastattn::cuda
