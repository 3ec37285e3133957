// Division of indices.
#pragma once

#include "division.h"
#include "ptx.cuh"

namespace fastattn::cuda {

struct Quotient {
  int64_t quotient, remainder;
};

// Of numbers >= 0, where there is nothing else for the thread to keep: the compiler divides in 32
// bits where both fit, some 20 instructions, and else by a call.
FA_DEVICE Quotient divide(int64_t a, int64_t b) {
  const uint64_t dividend = static_cast<uint64_t>(a), divisor = static_cast<uint64_t>(b);
  const uint64_t quotient = dividend / divisor;
  return {static_cast<int64_t>(quotient), static_cast<int64_t>(dividend - quotient * divisor)};
}

// Of a block's number, in three instructions.
FA_DEVICE uint32_t divide(uint32_t a, const Divisor& b) {
  return (__umulhi(a, b.multiplier) + a) >> b.shift;
}

}  // namespace fastattn::cuda
