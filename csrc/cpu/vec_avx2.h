// The vec vocabulary over AVX2 + FMA + F16C: eight floats. See vec_scalar.h for the contract of
// each name.
#pragma once

#include <immintrin.h>

#include "vec_scalar.h"

namespace fastattn::cpu {
namespace {

FA_INLINE __m256i first_lanes_avx2(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct VecAvx2 {
  using Real = float;
  static constexpr int kWidth = 8;
  static constexpr int kTileSums = 12, kTileVecs = 2;  // 12 + 2 + 1 of 16 registers
  static constexpr bool kStreams = true;
  __m256 v;

  static VecAvx2 broadcast(float x) {
    return {_mm256_set1_ps(x)};
  }
  static VecAvx2 zero() {
    return {_mm256_setzero_ps()};
  }

  static VecAvx2 load(const float* p) {
    return {_mm256_loadu_ps(p)};
  }
  static VecAvx2 load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static VecAvx2 load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  static VecAvx2 load(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
  }

  static VecAvx2 load(const double* p) {
    float narrow[8];
    for (int i = 0; i < 8; ++i) narrow[i] = static_cast<float>(p[i]);
    return load(narrow);
  }

  static VecAvx2 load_n(const float* p, int n) {
    return {_mm256_maskload_ps(p, first_lanes_avx2(n))};
  }
  template <typename T>
  static VecAvx2 load_n(const T* p, int n) {
    T padded[8] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
  }

  void store(float* p) const {
    _mm256_storeu_ps(p, v);
  }
  // The upper half of every lane, rounded to nearest even, in the lower one; NaN stays NaN.
  __m256i to_bf16_lanes() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i ordered = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
    return _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), rounded, ordered);
  }
  __m128i to_bf16() const {
    const __m256i lanes = to_bf16_lanes();
    return _mm256_castsi256_si128(
        _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08));
  }
  __m128i to_f16() const {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  }
  void store(bf16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16());
  }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16());
  }

  void store(int8_t* p) const {
    const __m256i words = _mm256_cvtps_epi32(v);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(words, words), 0x08);
    const __m128i low = _mm256_castsi256_si128(halves);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, low));
  }

  void stream(float* p) const {
    _mm256_stream_ps(p, v);
  }
  void stream(bf16* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16());
  }
  void stream(f16* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16());
  }
  static void finish_stream() {
    _mm_sfence();
  }

  template <typename T>
  VecAvx2 rounded() const;

  void store_n(float* p, int n) const {
    _mm256_maskstore_ps(p, first_lanes_avx2(n), v);
  }
  template <typename T>
  void store_n(T* p, int n) const {
    T all[8];
    store(all);
    for (int i = 0; i < n; ++i) p[i] = all[i];
  }
};

template <>
inline VecAvx2 VecAvx2::rounded<float>() const {
  return *this;
}
template <>
inline VecAvx2 VecAvx2::rounded<bf16>() const {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(to_bf16_lanes(), 16))};
}
template <>
inline VecAvx2 VecAvx2::rounded<f16>() const {
  return {_mm256_cvtph_ps(to_f16())};
}

FA_INLINE VecAvx2 add(VecAvx2 a, VecAvx2 b) {
  return {_mm256_add_ps(a.v, b.v)};
}
FA_INLINE VecAvx2 sub(VecAvx2 a, VecAvx2 b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
FA_INLINE VecAvx2 mul(VecAvx2 a, VecAvx2 b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
FA_INLINE VecAvx2 div(VecAvx2 a, VecAvx2 b) {
  return {_mm256_div_ps(a.v, b.v)};
}
FA_INLINE VecAvx2 max(VecAvx2 a, VecAvx2 b) {
  return {_mm256_max_ps(a.v, b.v)};
}
FA_INLINE VecAvx2 min(VecAvx2 a, VecAvx2 b) {
  return {_mm256_min_ps(a.v, b.v)};
}
FA_INLINE VecAvx2 fma(VecAvx2 a, VecAvx2 b, VecAvx2 c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

FA_INLINE VecAvx2 fused(VecAvx2 a, VecAvx2 b, VecAvx2 c) {
  return fma(a, b, c);
}
FA_INLINE VecAvx2 fused_minus(VecAvx2 a, VecAvx2 b, VecAvx2 c) {
  return {_mm256_fmsub_ps(a.v, b.v, c.v)};
}
FA_INLINE VecAvx2 minus_fused(VecAvx2 c, VecAvx2 a, VecAvx2 b) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}

FA_INLINE float reduce_add(VecAvx2 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

FA_INLINE float reduce_max(VecAvx2 x) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

template <typename Combine>
FA_INLINE VecAvx2 reduce_each(const VecAvx2 (&x)[8], Combine combine) {
  __m256 pair[4], quad[2];
  for (int i = 0; i < 4; ++i) {
    const __m256 a = x[2 * i].v, b = x[2 * i + 1].v;
    pair[i] = combine(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256 a = pair[2 * i], b = pair[2 * i + 1];
    quad[i] = combine(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  return {combine(_mm256_permute2f128_ps(quad[0], quad[1], 0x20),
                  _mm256_permute2f128_ps(quad[0], quad[1], 0x31))};
}
FA_INLINE VecAvx2 reduce_add_each(const VecAvx2 (&x)[8]) {
  return reduce_each(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}
FA_INLINE VecAvx2 reduce_max_each(const VecAvx2 (&x)[8]) {
  return reduce_each(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}

FA_INLINE void transpose(VecAvx2 (&x)[8]) {
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    pair[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

FA_INLINE VecAvx2 swap_pairs(VecAvx2 x) {
  return {_mm256_permute_ps(x.v, 0xb1)};
}

FA_INLINE VecAvx2 round_nearest(VecAvx2 x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

FA_INLINE VecAvx2 pow2_integral(VecAvx2 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}

FA_INLINE FloorSplit<VecAvx2> split_floor(VecAvx2 x) {
  x = min(VecAvx2::broadcast(127), max(VecAvx2::broadcast(-127), x));
  const VecAvx2 n = {_mm256_floor_ps(x.v)};
  return {sub(x, n), n};
}

FA_INLINE VecAvx2 scale_pow2(VecAvx2 x, VecAvx2 n) {
  return mul(x, pow2_integral(n));
}

FA_INLINE VecAvx2 select_less(VecAvx2 a, VecAvx2 b, VecAvx2 x, VecAvx2 y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

FA_INLINE bool all_less(VecAvx2 a, VecAvx2 b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) == 0xff;
}

}  // namespace
}  // namespace fastattn::cpu
