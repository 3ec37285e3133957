// Two vecs as one, for long chains of dependent instructions: side by side in the program, one
// chain fills the time in which the other waits. See vec_scalar.h for the contract of each name.
#pragma once

#include "vec_scalar.h"

namespace fastattn::cpu {
namespace {

template <typename V>
struct Two {
  using Real = typename V::Real;
  static constexpr int kWidth = 2 * V::kWidth;
  V a, b;

  static Two broadcast(Real x) {
    return {V::broadcast(x), V::broadcast(x)};
  }
  static Two zero() {
    return {V::zero(), V::zero()};
  }
  template <typename T>
  static Two load(const T* p) {
    return {V::load(p), V::load(p + V::kWidth)};
  }
  template <typename T>
  void store(T* p) const {
    a.store(p);
    b.store(p + V::kWidth);
  }
};

#define FA_TWO_UNARY(name)          \
  template <typename V>             \
  FA_INLINE Two<V> name(Two<V> x) { \
    return {name(x.a), name(x.b)};  \
  }
#define FA_TWO_BINARY(name)                   \
  template <typename V>                       \
  FA_INLINE Two<V> name(Two<V> x, Two<V> y) { \
    return {name(x.a, y.a), name(x.b, y.b)};  \
  }
#define FA_TWO_TERNARY(name)                            \
  template <typename V>                                 \
  FA_INLINE Two<V> name(Two<V> x, Two<V> y, Two<V> z) { \
    return {name(x.a, y.a, z.a), name(x.b, y.b, z.b)};  \
  }
FA_TWO_UNARY(round_nearest)
FA_TWO_UNARY(pow2_integral)
FA_TWO_BINARY(add)
FA_TWO_BINARY(sub)
FA_TWO_BINARY(mul)
FA_TWO_BINARY(div)
FA_TWO_BINARY(max)
FA_TWO_BINARY(min)
FA_TWO_TERNARY(fma)
FA_TWO_TERNARY(fused)
FA_TWO_TERNARY(fused_minus)
FA_TWO_TERNARY(minus_fused)
#undef FA_TWO_UNARY
#undef FA_TWO_BINARY
#undef FA_TWO_TERNARY

template <typename V>
FA_INLINE Two<V> select_less(Two<V> x, Two<V> y, Two<V> then, Two<V> otherwise) {
  return {select_less(x.a, y.a, then.a, otherwise.a), select_less(x.b, y.b, then.b, otherwise.b)};
}

template <typename V>
FA_INLINE bool all_less(Two<V> x, Two<V> y) {
  return all_less(x.a, y.a) && all_less(x.b, y.b);
}

// The vec of a long chain: two where registers are vectors, one where the compiler makes them.
template <typename V>
struct ChainVec {
  using Type = Two<V>;
};
template <typename R>
struct ChainVec<ScalarVec<R>> {
  using Type = ScalarVec<R>;
};

}  // namespace
}  // namespace fastattn::cpu
