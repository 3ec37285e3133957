// AVX-512 and AMX on a CPU that has neither, so that every line of the avx512 and amx levels is
// tested on any x86-64 machine. AVX-512 comes from SIMDe (Debian: libsimde-dev), AMX-BF16 and what
// SIMDe lacks from here. Built into the package by FASTATTN_CPU_EMULATE=1 for tests only: slow,
// never shipped.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulated {
namespace {

template <typename T>
struct Lanes {
  T lane[16];
};

template <typename T, typename Vector>
Lanes<T> lanes_of(const Vector& vector) {
  static_assert(sizeof(Lanes<T>) == sizeof(Vector));
  Lanes<T> result;
  memcpy(&result, &vector, sizeof(result));
  return result;
}

template <typename Vector, typename T>
Vector vector_of(const Lanes<T>& lanes) {
  static_assert(sizeof(Lanes<T>) == sizeof(Vector));
  Vector result;
  memcpy(&result, &lanes, sizeof(result));
  return result;
}

template <typename To, typename From, typename Function>
Lanes<To> map(const Lanes<From>& x, Function function) {
  Lanes<To> result;
  for (int i = 0; i < 16; ++i) result.lane[i] = function(x.lane[i]);
  return result;
}

// Masked loads and stores touch only the selected lanes, as the instructions do.
template <typename Vector, typename T>
Vector maskz_load(__mmask16 mask, const void* p) {
  Lanes<T> result = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(&result.lane[i], static_cast<const T*>(p) + i, sizeof(T));
  }
  return vector_of<Vector>(result);
}

// 32 numbers of 16 bits.
inline __m512i maskz_load_halves(__mmask32 mask, const void* p) {
  uint16_t lanes[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) memcpy(&lanes[i], static_cast<const uint16_t*>(p) + i, sizeof(lanes[i]));
  }
  __m512i result;
  memcpy(&result, lanes, sizeof(result));
  return result;
}

inline __mmask32 cmpgt_halves(__m512i a, __m512i b) {
  int16_t x[32], y[32];
  memcpy(x, &a, sizeof(x));
  memcpy(y, &b, sizeof(y));
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<__mmask32>(x[i] > y[i]) << i;
  return mask;
}

template <typename T, typename Vector>
void mask_store(void* p, __mmask16 mask, const Vector& vector) {
  const Lanes<T> lanes = lanes_of<T>(vector);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(static_cast<T*>(p) + i, &lanes.lane[i], sizeof(T));
  }
}

// Streaming stores fault on addresses that are not aligned.
template <typename T, typename Vector>
void stream(void* p, const Vector& vector) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Vector) != 0) abort();
  const Lanes<T> lanes = lanes_of<T>(vector);
  memcpy(p, &lanes, sizeof(lanes));
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float result;
  memcpy(&result, &wide, sizeof(result));
  return result;
}

// VCVTNEPS2BF16: to nearest even, quiet NaN, subnormals to zero.
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __m512i cvtepu16_epi32(__m256i x) {
  return vector_of<__m512i>(
      map<uint32_t>(lanes_of<uint16_t>(x), [](uint16_t v) { return uint32_t{v}; }));
}

inline __m256i cvtepi32_epi16(__m512i x) {
  return vector_of<__m256i>(
      map<uint16_t>(lanes_of<uint32_t>(x), [](uint32_t v) { return static_cast<uint16_t>(v); }));
}

inline __m512i cvtps_epi32(__m512 x) {
  return vector_of<__m512i>(map<int32_t>(
      lanes_of<float>(x), [](float v) { return static_cast<int32_t>(__builtin_nearbyintf(v)); }));
}

inline __m512i cvtepi8_epi32(__m128i x) {
  return vector_of<__m512i>(map<int32_t>(lanes_of<int8_t>(x), [](int8_t v) { return int32_t{v}; }));
}

inline __m128i cvtepi32_epi8(__m512i x) {
  return vector_of<__m128i>(
      map<uint8_t>(lanes_of<uint32_t>(x), [](uint32_t v) { return static_cast<uint8_t>(v); }));
}

inline __m512 cvtepi32_ps(__m512i x) {
  return vector_of<__m512>(
      map<float>(lanes_of<int32_t>(x), [](int32_t v) { return static_cast<float>(v); }));
}

inline __m512 cvtph_ps(__m256i x) {
  return vector_of<__m512>(
      map<float>(lanes_of<uint16_t>(x), [](uint16_t v) { return _cvtsh_ss(v); }));
}

inline __m256i cvtps_ph(__m512 x) {
  return vector_of<__m256i>(map<uint16_t>(lanes_of<float>(x), [](float v) {
    return static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
  }));
}

inline __m256i cvtneps_pbh(__m512 x) {
  return vector_of<__m256i>(map<uint16_t>(lanes_of<float>(x), float_to_bf16));
}

inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  const __m256i halves[2] = {cvtneps_pbh(low), cvtneps_pbh(high)};
  __m512i result;
  memcpy(&result, halves, sizeof(result));
  return result;
}

// VREDUCEPS towards minus infinity, with no bits of the fraction kept: what is above the floor.
inline __m512 reduce_floor(__m512 x) {
  return vector_of<__m512>(map<float>(lanes_of<float>(x), [](float v) {
    return __builtin_isinf(v) ? 0.0f : v - __builtin_floorf(v);
  }));
}

// VSCALEFPS: x 2^floor(n).
inline __m512 scalef(__m512 x, __m512 n) {
  const Lanes<float> exponent = lanes_of<float>(n);
  Lanes<float> result = lanes_of<float>(x);
  for (int i = 0; i < 16; ++i)
    result.lane[i] *= __builtin_exp2f(__builtin_floorf(exponent.lane[i]));
  return vector_of<__m512>(result);
}

// The tree order of the compiler's reduction.
template <typename Combine>
float reduce(__m512 x, Combine combine) {
  Lanes<float> lanes = lanes_of<float>(x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes.lane[i] = combine(lanes.lane[i], lanes.lane[i + half]);
  }
  return lanes.lane[0];
}

inline float reduce_add(__m512 x) {
  return reduce(x, [](float a, float b) { return a + b; });
}

inline float reduce_max(__m512 x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}

// VDPBF16PS: the odd product of each pair is added first, then the even one; subnormal numbers are
// zero.
inline __m512 dpbf16_ps(__m512 sum, __m512i a, __m512i b) {
  const auto flushed = [](float x) { return __builtin_fabsf(x) < 0x1p-126f ? x * 0.0f : x; };
  const Lanes<uint32_t> x = lanes_of<uint32_t>(a), y = lanes_of<uint32_t>(b);
  Lanes<float> result = lanes_of<float>(sum);
  for (int i = 0; i < 16; ++i) {
    for (int shift = 16; shift >= 0; shift -= 16) {
      const float left = flushed(bf16_to_float(static_cast<uint16_t>(x.lane[i] >> shift)));
      const float right = flushed(bf16_to_float(static_cast<uint16_t>(y.lane[i] >> shift)));
      result.lane[i] = flushed(__builtin_fmaf(left, right, flushed(result.lane[i])));
    }
  }
  return vector_of<__m512>(result);
}

// The eight tiles of a thread: up to 16 rows of 64 bytes. Using them unconfigured ends the program,
// as the hardware would.
struct Tiles {
  bool is_configured = false;
  uint8_t rows[8];
  uint8_t data[8][16][64];
};

inline Tiles& tiles() {
  static thread_local Tiles state;
  return state;
}

inline uint8_t (&tile(int index))[16][64] {
  if (!tiles().is_configured) abort();
  return tiles().data[index];
}

inline void tile_load_config(const void* config) {
  tiles().is_configured = true;
  memcpy(tiles().rows, static_cast<const char*>(config) + 48, sizeof(tiles().rows));
  memset(tiles().data, 0xff, sizeof(tiles().data));  // every bfloat16 and float of it is NaN
}

inline void tile_release() {
  tiles().is_configured = false;
}

inline void tile_zero(int index) {
  memset(tile(index), 0, sizeof(tile(index)));
}

inline void tile_load(int index, const void* base, size_t stride) {
  for (int r = 0; r < tiles().rows[index]; ++r) {
    memcpy(tile(index)[r], static_cast<const char*>(base) + r * stride, 64);
  }
}

inline void tile_store(int index, void* base, size_t stride) {
  for (int r = 0; r < tiles().rows[index]; ++r) {
    memcpy(static_cast<char*>(base) + r * stride, tile(index)[r], 64);
  }
}

// TDPBF16PS: per element of C, all even products and all odd products are added in turn.
inline void tile_dpbf16(int c_index, int a_index, int b_index) {
  float c[16][16];
  uint16_t a[16][32], b[16][32];
  memcpy(c, tile(c_index), sizeof(c));
  memcpy(a, tile(a_index), sizeof(a));
  memcpy(b, tile(b_index), sizeof(b));
  if (tiles().rows[a_index] != tiles().rows[c_index] || tiles().rows[b_index] != 16) abort();
  for (int m = 0; m < tiles().rows[c_index]; ++m) {
    for (int k = 0; k < 16; ++k) {
      const float even = bf16_to_float(a[m][2 * k]), odd = bf16_to_float(a[m][2 * k + 1]);
      for (int n = 0; n < 16; ++n) {
        c[m][n] += even * bf16_to_float(b[k][2 * n]);
        c[m][n] += odd * bf16_to_float(b[k][2 * n + 1]);
      }
    }
  }
  memcpy(tile(c_index), c, sizeof(c));
}

}  // namespace
}  // namespace emulated

#define _mm256_mask_storeu_epi16 emulated::mask_store<uint16_t>
#define _mm256_maskz_loadu_epi16 emulated::maskz_load<__m256i, uint16_t>
#define _mm512_maskz_loadu_epi16 emulated::maskz_load_halves
#define _mm512_cmpgt_epi16_mask emulated::cmpgt_halves
#define _mm512_mask_storeu_ps emulated::mask_store<float>
#define _mm512_stream_ps emulated::stream<float>
#define _mm512_maskz_loadu_ps emulated::maskz_load<__m512, float>
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) emulated::cvtps_ph(x)
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define __m512bh __m512i
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_reduce_ps(x, rounding) emulated::reduce_floor(x)
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated::scalef
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_reduce_max_ps emulated::reduce_max
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::tile_load_config
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_load
#define _tile_stream_loadd emulated::tile_load
#define _tile_stored emulated::tile_store
#define _tile_dpbf16ps emulated::tile_dpbf16
