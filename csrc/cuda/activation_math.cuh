// The activations and their derivatives, element by element.
//
// float32 results are within 2 units in the last place (accurate_math.inc), at about 60
// instructions for gelu. float32 derivatives leave out what that takes to carry rounding errors.
// What is of 16 bits is made of the approximate instructions for 2^x and 1 / x: relative errors of
// a few 1e-7, of gelu 2e-6.
#pragma once

#include "fastattn/activation_params.h"
#include "lanes.cuh"

#define FA_MATH FA_DEVICE
#define FA_MATH_RARE FA_DEVICE  // a call would keep its registers in local memory

namespace fastattn::cuda {

#include "fastattn/accurate_math.inc"

constexpr float kLog2OfE = 1.44269504f;
// Of the sigmoid in gelu's tanh form, x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), in powers of
// two; and of its derivative.
constexpr float kTanhLinear = 2.30220820f, kTanhCubic = 0.102943240f;
constexpr float kTanhRate = 1.59576912f, kTanhSquareRate = 0.214064449f;

// A value and the derivative there.
struct Slope {
  float value, slope;
};

// 2^-y for y >= 0, for results of T; 0 from y = 127 on.
template <typename T>
FA_DEVICE float decay2(float y) {
  if constexpr (sizeof(T) == 2) {
    return ptx::exp2(-y);
  } else {
    using Lane = Lanes<1>;
    const Decay<Lane> e = decay_of<Lane>({{{y < 127.0f ? y : 127.0f}}, {{0.0f}}});
    return mul(e.fraction.hi, pow2_integral(sub(Lane::zero(), e.exponent))).lane[0];
  }
}

template <typename T>
FA_DEVICE float reciprocal(float x) {
  const float y = ptx::reciprocal(x);
  return sizeof(T) == 2 ? y : fmaf(fmaf(-x, y, 1.0f), y, y);
}

// P(u) with u = 1 / (|x| + kShift) and Phi(-|x|) = P(u) exp(-x^2 / 2), where the latter is not 0.
// Minimax for the relative error, as in accurate_math.inc: 1.3e-6, for T of 16 bits, or 4e-8.
template <typename T>
FA_DEVICE float normal_tail_ratio(float x) {
  if constexpr (sizeof(T) == 2) {
    const float u = ptx::reciprocal(fabsf(x) + 5.0f);
    float p = fmaf(21804.2363f, u, -6044.1582f);
    p = fmaf(p, u, 1396.68591f);
    p = fmaf(p, u, -76.9915009f);
    p = fmaf(p, u, 16.5671387f);
    p = fmaf(p, u, 1.77730322f);
    return fmaf(p, u, 0.401750952f) * u;
  } else {
    const float u = reciprocal<T>(fabsf(x) + 3.0f);
    float p = fmaf(-457.195435f, u, 864.732544f);
    p = fmaf(p, u, -602.986877f);
    p = fmaf(p, u, 163.207947f);
    p = fmaf(p, u, -13.7680511f);
    p = fmaf(p, u, 9.82228088f);
    p = fmaf(p, u, 3.02638769f);
    p = fmaf(p, u, 1.20257151f);
    return fmaf(p, u, 0.398857325f) * u;
  }
}

// Phi(x), where decay is exp(-x^2 / 2).
template <typename T>
FA_DEVICE float normal_cdf(float x, float decay) {
  const float tail = normal_tail_ratio<T>(x) * decay;
  return x < 0.0f ? tail : 1.0f - tail;
}

// exp(-x^2 / 2)
template <typename T>
FA_DEVICE float normal_decay(float x) {
  return decay2<T>(x * x * (0.5f * kLog2OfE));
}

// 1 / (1 + 2^-y)
FA_DEVICE float sigmoid2(float y) {
  return ptx::reciprocal(1.0f + ptx::exp2(-y));
}

// x sigmoid(a(x)) with |a(x)| in powers of two and a'(x).
template <typename T>
FA_DEVICE Slope sigmoid_slope(float x, float magnitude, float rate) {
  const float e = decay2<T>(magnitude), far = reciprocal<T>(1.0f + e), near = e * far;
  const float sigmoid = x < 0.0f ? near : far, complement = x < 0.0f ? far : near;
  return {x * sigmoid, sigmoid * fmaf(x * complement, rate, 1.0f)};
}

// NOTE: for infinity and NaN these give what the formulas say, NaN for -infinity.
template <Activation kKind, typename T>
FA_DEVICE Slope slope_of(float x) {
  if constexpr (kKind == Activation::kGelu) {
    const float decay = normal_decay<T>(x), cdf = normal_cdf<T>(x, decay);
    return {x * cdf, fmaf(x * decay, 0.398942280f, cdf)};
  } else if constexpr (kKind == Activation::kGeluTanh) {
    const float t = fminf(fabsf(x), 11.0f), square = t * t;  // beyond, the sigmoid is 0 or 1
    return sigmoid_slope<T>(x, t * fmaf(square, kTanhCubic, kTanhLinear),
                            fmaf(square, kTanhSquareRate, kTanhRate));
  } else if constexpr (kKind == Activation::kSilu) {
    return sigmoid_slope<T>(x, fabsf(x) * kLog2OfE, 1.0f);
  } else {
    // As in torch, 0 at 0 and 1 at NaN.
    return {x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  }
}

// For results of 16 bits.
template <Activation kKind>
FA_DEVICE float fast_value_of(float x) {
  if constexpr (kKind == Activation::kGelu) {
    return x * normal_cdf<bf16>(x, normal_decay<bf16>(x));
  } else if constexpr (kKind == Activation::kGeluTanh) {
    return x * sigmoid2(x * fmaf(x * x, kTanhCubic, kTanhLinear));
  } else {
    return x * sigmoid2(x * kLog2OfE);
  }
}

template <Activation kKind, int kCount>
FA_DEVICE Lanes<kCount> accurate_value_of(const Lanes<kCount>& x) {
  if constexpr (kKind == Activation::kGelu) return accurate_gelu(x);
  if constexpr (kKind == Activation::kGeluTanh) return accurate_gelu_tanh(x);
  return accurate_silu(x);
}

// x becomes act(x), to be stored as T.
template <Activation kKind, typename T, int kCount>
FA_DEVICE void activate(float (&x)[kCount]) {
  if constexpr (kKind == Activation::kRelu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i];  // NaN stays
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fast_value_of<kKind>(x[i]);
  } else {
    Lanes<kCount> lanes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) lanes.lane[i] = x[i];
    lanes = accurate_value_of<kKind>(lanes);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = lanes.lane[i];
  }
}

// body<kind>()
template <typename Body>
FA_DEVICE void with_kind(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::kGelu: return body.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh: return body.template operator()<Activation::kGeluTanh>();
    case Activation::kSilu: return body.template operator()<Activation::kSilu>();
    case Activation::kRelu: return body.template operator()<Activation::kRelu>();
  }
}

}  // namespace fastattn::cuda
