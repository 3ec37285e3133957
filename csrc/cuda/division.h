// Division by a number that the host knows.
#pragma once

#include "fastattn/types.h"

namespace fastattn::cuda {

// a / value = ((a * multiplier >> 32) + a) >> shift for a < 2^31 (Granlund and Montgomery,
// "Division by invariant integers using multiplication", 1994).
struct Divisor {
  uint32_t value, multiplier, shift;
};

// 1 <= value < 2^31
inline Divisor divisor(uint32_t value) {
  uint32_t shift = 0;
  while (uint64_t{1} << shift < value) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - value;
  return {value, static_cast<uint32_t>((excess << 32) / value + 1), shift};
}

}  // namespace fastattn::cuda
