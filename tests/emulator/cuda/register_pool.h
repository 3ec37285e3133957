// setmaxnreg: the registers that the warpgroups of a block share.
#pragma once

#include <vector>

#include "failure.h"
#include "order.h"

namespace fastattn::emulator {

class RegisterPool {
 public:
  void begin_block(int threads);
  // The warpgroup of the current thread, all of which calls it, has so many a thread. More are
  // waited for.
  void give_up(int registers, const Where& where);
  void demand(int registers, const Where& where);

 private:
  struct Group {
    int registers, wanted;     // a thread; wanted is 0 where none are waited for
    std::vector<int> waiting;  // threads
  };

  static void run_give_up(void* const* operands);
  static void run_demand(void* const* operands);
  void grant();

  Group groups_[kMaxGroups];
  int free_ = 0;
};

extern RegisterPool register_pool;

}  // namespace fastattn::emulator
