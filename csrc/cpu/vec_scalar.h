// The vec vocabulary in plain C++: any CPU, float and double. The other levels offer the same names
// over intrinsics.
//
// A Vec holds kWidth reals. Loads convert from any storage type; the *_n forms touch only the first
// n elements and give zeros in the other lanes. max(a, b) gives b where either is NaN, so that a
// NaN score is kept by exp's clamp.
#pragma once

#include <string.h>

#include <fastattn/types.h>

namespace fastattn::cpu {
namespace {

FA_INLINE float to_float(float x) {
  return x;
}

FA_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

FA_INLINE float to_float(f16 x) {
  // Shift the 15 magnitude bits into float position; multiplying by 2^112 rebiases normals and
  // subnormals alike.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  float result;
  memcpy(&result, &magnitude, sizeof(result));
  result *= 5.192296858534828e33f;
  uint32_t bits;
  memcpy(&bits, &result, sizeof(bits));
  // Infinity and NaN keep their payload.
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;
  bits |= sign;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

FA_INLINE double to_float(double x) {
  return x;
}

FA_INLINE float to_float(int8_t x) {
  return x;
}

FA_INLINE void from_float(float x, float* out) {
  *out = x;
}

FA_INLINE void from_float(double x, double* out) {
  *out = x;
}

FA_INLINE void from_float(double x, float* out) {
  *out = static_cast<float>(x);
}

// |x| <= 127; to nearest, ties to even.
FA_INLINE void from_float(float x, int8_t* out) {
  const float magic = 12582912.0f;  // 1.5 * 2^23 leaves no fraction bits
  *out = static_cast<int8_t>((x + magic) - magic);
}

FA_INLINE void from_float(double x, int8_t* out) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  *out = static_cast<int8_t>((x + magic) - magic);
}

FA_INLINE void from_float(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  out->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

FA_INLINE void from_float(float x, f16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x47800000) {  // 65536 and above
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Below 2^-14: adding 0.5 leaves the bits of the subnormal at the bottom.
    float shifted;
    memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    memcpy(&half, &shifted, sizeof(half));
    half -= 0x3f000000;
  } else {  // rounding may carry into infinity, as it should from 65520 on
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

template <typename R>
struct ScalarVec {
  using Real = R;
  // Baseline x86-64 and NEON registers hold four floats: the compiler vectorises the loops.
  static constexpr int kWidth = 4;
  // Register tile of a product: kTileSums accumulators, a row of up to kTileVecs vecs of B and one
  // broadcast must fit the registers.
  static constexpr int kTileSums = 8, kTileVecs = 2;
  static constexpr bool kStreams = false;  // whether stream differs from store
  R lane[kWidth];

  static ScalarVec broadcast(R x) {
    return {{x, x, x, x}};
  }
  static ScalarVec zero() {
    return broadcast(0);
  }
  template <typename T>
  static ScalarVec load(const T* p) {
    ScalarVec result;
    for (int i = 0; i < kWidth; ++i) result.lane[i] = static_cast<R>(to_float(p[i]));
    return result;
  }
  template <typename T>
  static ScalarVec load_n(const T* p, int n) {
    ScalarVec result = zero();
    for (int i = 0; i < n; ++i) result.lane[i] = static_cast<R>(to_float(p[i]));
    return result;
  }
  template <typename T>
  void store(T* p) const {
    for (int i = 0; i < kWidth; ++i) from_float(lane[i], p + i);
  }
  template <typename T>
  void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) from_float(lane[i], p + i);
  }
  // store, past the cache where the level can; p is aligned to the vec. finish_stream makes what
  // this thread has streamed visible to others.
  template <typename T>
  void stream(T* p) const {
    store(p);
  }
  static void finish_stream() {}
  // What a store to T and a load would give.
  template <typename T>
  ScalarVec rounded() const {
    T stored[kWidth];
    store(stored);
    return load(stored);
  }
};

#define FA_SCALAR_BINARY(name, expression)                                    \
  template <typename R>                                                       \
  FA_INLINE ScalarVec<R> name(const ScalarVec<R>& x, const ScalarVec<R>& y) { \
    ScalarVec<R> result;                                                      \
    for (int i = 0; i < ScalarVec<R>::kWidth; ++i) {                          \
      const R a = x.lane[i], b = y.lane[i];                                   \
      result.lane[i] = expression;                                            \
    }                                                                         \
    return result;                                                            \
  }

FA_SCALAR_BINARY(add, a + b)
FA_SCALAR_BINARY(sub, a - b)
FA_SCALAR_BINARY(mul, a* b)
FA_SCALAR_BINARY(div, a / b)
FA_SCALAR_BINARY(max, a > b ? a : b)
FA_SCALAR_BINARY(min, a < b ? a : b)
#undef FA_SCALAR_BINARY

// a * b + c
template <typename R>
FA_INLINE ScalarVec<R> fma(const ScalarVec<R>& a, const ScalarVec<R>& b, const ScalarVec<R>& c) {
  return add(mul(a, b), c);
}

// a * b + c with one rounding: where the product must be exact. (Within double's 53 bits it is, and
// then so is a sum that cancels.)
FA_INLINE ScalarVec<float> fused(const ScalarVec<float>& a, const ScalarVec<float>& b,
                                 const ScalarVec<float>& c) {
  ScalarVec<float> result;
  for (int i = 0; i < 4; ++i) {
    const double product = static_cast<double>(a.lane[i]) * static_cast<double>(b.lane[i]);
    result.lane[i] = static_cast<float>(product + static_cast<double>(c.lane[i]));
  }
  return result;
}

// a * b - c and c - a * b, likewise.
FA_INLINE ScalarVec<float> fused_minus(const ScalarVec<float>& a, const ScalarVec<float>& b,
                                       const ScalarVec<float>& c) {
  return fused(a, b, sub(ScalarVec<float>::zero(), c));
}
FA_INLINE ScalarVec<float> minus_fused(const ScalarVec<float>& c, const ScalarVec<float>& a,
                                       const ScalarVec<float>& b) {
  return fused(sub(ScalarVec<float>::zero(), a), b, c);
}

template <typename R>
FA_INLINE R reduce_add(const ScalarVec<R>& x) {
  return (x.lane[0] + x.lane[1]) + (x.lane[2] + x.lane[3]);
}

template <typename R>
FA_INLINE R reduce_max(const ScalarVec<R>& x) {
  return max_of(max_of(x.lane[0], x.lane[1]), max_of(x.lane[2], x.lane[3]));
}

// Lane i is the sum, or the maximum, of the lanes of x[i].
template <typename R>
FA_INLINE ScalarVec<R> reduce_add_each(const ScalarVec<R> (&x)[4]) {
  return {{reduce_add(x[0]), reduce_add(x[1]), reduce_add(x[2]), reduce_add(x[3])}};
}
template <typename R>
FA_INLINE ScalarVec<R> reduce_max_each(const ScalarVec<R> (&x)[4]) {
  return {{reduce_max(x[0]), reduce_max(x[1]), reduce_max(x[2]), reduce_max(x[3])}};
}

// x[i] lane j becomes x[j] lane i.
template <typename R>
FA_INLINE void transpose(ScalarVec<R> (&x)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const R t = x[i].lane[j];
      x[i].lane[j] = x[j].lane[i];
      x[j].lane[i] = t;
    }
  }
}

// Lanes 2 i and 2 i + 1 exchanged.
template <typename R>
FA_INLINE ScalarVec<R> swap_pairs(const ScalarVec<R>& x) {
  return {{x.lane[1], x.lane[0], x.lane[3], x.lane[2]}};
}

// 2^n for integral n in [-127, 127]; 0 for n == -127.
FA_INLINE ScalarVec<float> pow2_integral(const ScalarVec<float>& n) {
  ScalarVec<float> result;
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23;
    memcpy(&result.lane[i], &bits, sizeof(bits));
  }
  return result;
}

FA_INLINE ScalarVec<float> round_nearest(const ScalarVec<float>& x) {
  ScalarVec<float> result;
  for (int i = 0; i < 4; ++i) {
    const float magic = 12582912.0f;  // 1.5 * 2^23 leaves no fraction bits; |x| <= 127 here
    result.lane[i] = (x.lane[i] + magic) - magic;
  }
  return result;
}

// x = floor(x) + fraction. `whole` is what scale_pow2 takes: floor(x) within [-127, 127], or at a
// level that needs neither, x.
template <typename V>
struct FloorSplit {
  V fraction, whole;
};

FA_INLINE FloorSplit<ScalarVec<float>> split_floor(const ScalarVec<float>& x) {
  FloorSplit<ScalarVec<float>> result;
  for (int i = 0; i < 4; ++i) {
    const float limited = x.lane[i] < -127 ? -127 : x.lane[i] > 127 ? 127 : x.lane[i];
    result.whole.lane[i] = __builtin_floorf(limited);
    result.fraction.lane[i] = limited - result.whole.lane[i];
  }
  return result;
}

// x 2^floor(n), for an n of split_floor; below 2^-126 it is 0, or subnormal.
FA_INLINE ScalarVec<float> scale_pow2(const ScalarVec<float>& x, const ScalarVec<float>& n) {
  return mul(x, pow2_integral(n));
}

FA_INLINE ScalarVec<double> exp2_exact(const ScalarVec<double>& x) {
  ScalarVec<double> result;
  for (int i = 0; i < 4; ++i) result.lane[i] = __builtin_exp2(x.lane[i]);
  return result;
}

FA_INLINE ScalarVec<double> erfc_exact(const ScalarVec<double>& x) {
  ScalarVec<double> result;
  for (int i = 0; i < 4; ++i) result.lane[i] = __builtin_erfc(x.lane[i]);
  return result;
}

FA_INLINE ScalarVec<double> tanh_exact(const ScalarVec<double>& x) {
  ScalarVec<double> result;
  for (int i = 0; i < 4; ++i) result.lane[i] = __builtin_tanh(x.lane[i]);
  return result;
}

// Lane by lane: a < b ? x : y.
template <typename R>
FA_INLINE ScalarVec<R> select_less(const ScalarVec<R>& a, const ScalarVec<R>& b,
                                   const ScalarVec<R>& x, const ScalarVec<R>& y) {
  ScalarVec<R> result;
  for (int i = 0; i < 4; ++i) result.lane[i] = a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i];
  return result;
}

// Whether a < b in every lane; a NaN is not.
template <typename R>
FA_INLINE bool all_less(const ScalarVec<R>& a, const ScalarVec<R>& b) {
  bool result = true;
  for (int i = 0; i < 4; ++i) result &= a.lane[i] < b.lane[i];
  return result;
}

}  // namespace
}  // namespace fastattn::cpu
