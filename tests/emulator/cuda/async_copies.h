// cp.async: the copies that one thread has in flight.
#pragma once

#include <stddef.h>

#include <vector>

#include "failure.h"

namespace fastattn::emulator {

class AsyncCopies {
 public:
  // 16 bytes of shared memory, of which the first `bytes` are to come from `global`.
  void issue(void* shared, const void* global, int bytes, const Where& where);
  void commit() {
    ++committed_;
  }
  // All but the newest `pending` groups land.
  void wait(int pending, const Where& where);

  // Nothing may be left.
  void end_thread();
  void clear();

 private:
  struct Copy {
    void* shared;
    const void* global;
    int bytes, group;
    Where where;
  };
  std::vector<Copy> copies_;  // from first_ on, in the order of their groups
  size_t first_ = 0;
  int committed_ = 0;
};

}  // namespace fastattn::emulator
