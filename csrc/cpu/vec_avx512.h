// The vec vocabulary over AVX-512 (F, BW, VL, DQ): sixteen floats. See vec_scalar.h for the
// contract of each name.
#pragma once

#ifndef FASTATTN_INTRINSICS_HEADER
#define FASTATTN_INTRINSICS_HEADER \
  <immintrin.h>  // the tests put an emulation here on machines without AVX-512
#endif
#include FASTATTN_INTRINSICS_HEADER

#include "vec_scalar.h"

namespace fastattn::cpu {
namespace {

FA_INLINE __mmask16 first_lanes_avx512(int n) {
  return static_cast<__mmask16>((1u << n) - 1);
}

struct VecAvx512 {
  using Real = float;
  static constexpr int kWidth = 16;
  static constexpr int kTileSums = 24, kTileVecs = 4;  // 24 + 4 + 1 of 32 registers
  static constexpr bool kStreams = true;
  __m512 v;

  static VecAvx512 broadcast(float x) {
    return {_mm512_set1_ps(x)};
  }
  static VecAvx512 zero() {
    return {_mm512_setzero_ps()};
  }

  static VecAvx512 from_bf16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static VecAvx512 load(const float* p) {
    return {_mm512_loadu_ps(p)};
  }
  static VecAvx512 load(const bf16* p) {
    return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static VecAvx512 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }

  static VecAvx512 load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
  }

  static VecAvx512 load(const double* p) {
    float narrow[16];
    for (int i = 0; i < 16; ++i) narrow[i] = static_cast<float>(p[i]);
    return load(narrow);
  }

  static VecAvx512 load_n(const double* p, int n) {
    float narrow[16] = {};
    for (int i = 0; i < n; ++i) narrow[i] = static_cast<float>(p[i]);
    return load(narrow);
  }
  static VecAvx512 load_n(const int8_t* p, int n) {
    int8_t padded[16] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
  }
  static VecAvx512 load_n(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(first_lanes_avx512(n), p)};
  }
  static VecAvx512 load_n(const bf16* p, int n) {
    return from_bf16(_mm256_maskz_loadu_epi16(first_lanes_avx512(n), p));
  }
  static VecAvx512 load_n(const f16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes_avx512(n), p))};
  }

  // Round to nearest even; NaN stays NaN.
#if defined(__AVX512BF16__)
  __m256i to_bf16() const {
    return (__m256i)_mm512_cvtneps_pbh(v);  // subnormal numbers become 0
  }
#else
  __m256i to_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 ordered = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_blend_epi32(ordered, _mm512_set1_epi32(0x7fc0), rounded));
  }
#endif
  void store(float* p) const {
    _mm512_storeu_ps(p, v);
  }
  void store(bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16());
  }
  void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  void store_n(int8_t* p, int n) const {
    int8_t all[16];
    store(all);
    for (int i = 0; i < n; ++i) p[i] = all[i];
  }
  void stream(float* p) const {
    _mm512_stream_ps(p, v);
  }
  void stream(bf16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16());
  }
  void stream(f16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void finish_stream() {
    _mm_sfence();
  }

  template <typename T>
  VecAvx512 rounded() const;

  void store_n(float* p, int n) const {
    _mm512_mask_storeu_ps(p, first_lanes_avx512(n), v);
  }
  void store_n(bf16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first_lanes_avx512(n), to_bf16());
  }
  void store_n(f16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first_lanes_avx512(n),
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
inline VecAvx512 VecAvx512::rounded<float>() const {
  return *this;
}
template <>
inline VecAvx512 VecAvx512::rounded<bf16>() const {
  return from_bf16(to_bf16());
}
template <>
inline VecAvx512 VecAvx512::rounded<f16>() const {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))};
}

FA_INLINE VecAvx512 add(VecAvx512 a, VecAvx512 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
FA_INLINE VecAvx512 sub(VecAvx512 a, VecAvx512 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
FA_INLINE VecAvx512 mul(VecAvx512 a, VecAvx512 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
FA_INLINE VecAvx512 div(VecAvx512 a, VecAvx512 b) {
  return {_mm512_div_ps(a.v, b.v)};
}
FA_INLINE VecAvx512 max(VecAvx512 a, VecAvx512 b) {
  return {_mm512_max_ps(a.v, b.v)};
}
FA_INLINE VecAvx512 min(VecAvx512 a, VecAvx512 b) {
  return {_mm512_min_ps(a.v, b.v)};
}
// The maximum of what is positive or NaN (which is above all), by the unit for integers: next to
// tile products the one for floats is what there is too little of.
FA_INLINE VecAvx512 max_of_positive(VecAvx512 a, VecAvx512 b) {
  return {
      _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
FA_INLINE VecAvx512 fma(VecAvx512 a, VecAvx512 b, VecAvx512 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

FA_INLINE VecAvx512 fused(VecAvx512 a, VecAvx512 b, VecAvx512 c) {
  return fma(a, b, c);
}
FA_INLINE VecAvx512 fused_minus(VecAvx512 a, VecAvx512 b, VecAvx512 c) {
  return {_mm512_fmsub_ps(a.v, b.v, c.v)};
}
FA_INLINE VecAvx512 minus_fused(VecAvx512 c, VecAvx512 a, VecAvx512 b) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}

FA_INLINE float reduce_add(VecAvx512 x) {
  return _mm512_reduce_add_ps(x.v);
}
FA_INLINE float reduce_max(VecAvx512 x) {
  return _mm512_reduce_max_ps(x.v);
}

template <typename Combine>
FA_INLINE VecAvx512 reduce_each(const VecAvx512 (&x)[16], Combine combine) {
  __m512 pair[8], quad[4], half[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = x[2 * i].v, b = x[2 * i + 1].v;
    pair[i] = combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = pair[2 * i], b = pair[2 * i + 1];
    quad[i] = combine(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quad[2 * i], b = quad[2 * i + 1];
    half[i] = combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return {combine(_mm512_shuffle_f32x4(half[0], half[1], 0x88),
                  _mm512_shuffle_f32x4(half[0], half[1], 0xdd))};
}
FA_INLINE VecAvx512 reduce_add_each(const VecAvx512 (&x)[16]) {
  return reduce_each(x, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
}
FA_INLINE VecAvx512 reduce_max_each(const VecAvx512 (&x)[16]) {
  return reduce_each(x, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
}

FA_INLINE void transpose(VecAvx512 (&x)[16]) {
  __m512 pair[16], quad[16], half[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    pair[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  // quad[4 g + c] holds, in its 128-bit lane l, rows 4 g .. 4 g + 3 of column 4 l + c.
  for (int c = 0; c < 4; ++c) {
    half[c] = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0x88);
    half[4 + c] = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0xdd);
    half[8 + c] = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0x88);
    half[12 + c] = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    x[c].v = _mm512_shuffle_f32x4(half[c], half[8 + c], 0x88);
    x[8 + c].v = _mm512_shuffle_f32x4(half[c], half[8 + c], 0xdd);
    x[4 + c].v = _mm512_shuffle_f32x4(half[4 + c], half[12 + c], 0x88);
    x[12 + c].v = _mm512_shuffle_f32x4(half[4 + c], half[12 + c], 0xdd);
  }
}

FA_INLINE VecAvx512 swap_pairs(VecAvx512 x) {
  return {_mm512_shuffle_ps(x.v, x.v, 0xb1)};
}

FA_INLINE VecAvx512 round_nearest(VecAvx512 x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

FA_INLINE VecAvx512 pow2_integral(VecAvx512 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

FA_INLINE FloorSplit<VecAvx512> split_floor(VecAvx512 x) {
  return {{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}, x};
}

FA_INLINE VecAvx512 scale_pow2(VecAvx512 x, VecAvx512 n) {
  return {_mm512_scalef_ps(x.v, n.v)};  // which takes the floor of n
}

FA_INLINE VecAvx512 select_less(VecAvx512 a, VecAvx512 b, VecAvx512 x, VecAvx512 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

FA_INLINE bool all_less(VecAvx512 a, VecAvx512 b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) == 0xffff;
}

}  // namespace
}  // namespace fastattn::cpu
