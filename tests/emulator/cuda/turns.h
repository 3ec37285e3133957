// What orders the blocks of a kernel: numbers in global memory, and the sums by TMA that they
// order. Blocks run one after the other here. So it is not by luck that sums come in some order,
// but a kernel that orders them at all must order all of them, by what the thread knows that adds.
#pragma once

#include <stdint.h>

#include <unordered_map>
#include <unordered_set>

#include "failure.h"

namespace fastattn::emulator {

// Sums, each by a number of its own.
using Sums = std::unordered_set<uint64_t>;

class Turns {
 public:
  void begin_launch();

  // By the current thread, of a number in global memory.
  uint32_t fetch_add(uint32_t* number, uint32_t value);
  void release(uint32_t* number, uint32_t value);
  void await(const uint32_t* number, uint32_t least, const Where& where);

  // A sum to what lies from `place` on begins, by a thread that knows these; its number.
  uint64_t add(const void* place, const Sums& known, const Where& where);

 private:
  bool is_used_ = false;  // in this launch
  uint64_t count_ = 0;
  std::unordered_map<const void*, uint64_t> newest_;  // sum, by its place
  std::unordered_map<const uint32_t*, Sums> released_;
};

extern Turns turns;

}  // namespace fastattn::emulator
