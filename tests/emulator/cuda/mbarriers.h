// The mbarriers of the block that runs, and the copies that report to them.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "failure.h"
#include "order.h"
#include "tensor_maps.h"

namespace fastattn::emulator {

class Mbarriers {
 public:
  void init(void* pointer, int arrivals, const Where& where);
  void fence_init();
  // One arrival, and bytes to wait for.
  void arrive(void* pointer, int bytes, const char* name, const Where& where);
  void wait(void* pointer, int parity, const Where& where);
  // A copy to shared memory that lands when somebody waits for it, at the barrier.
  void load(const Transfer& transfer, void* pointer, const Where& where);

  void begin_block() {
    count_ = 0;
  }
  // Nothing may be under way.
  void end_block();
  // Adds what those lack that threads wait for.
  void describe_waiting(std::string& text) const;

 private:
  struct Load {
    Transfer transfer;
    Where where;
  };
  struct Barrier {
    const void* pointer;
    Actor actor;
    int arrivals, missing;  // of a phase; in this one
    int64_t bytes;          // announced and not yet there
    uint32_t phase;
    int unseen;                // threads that have waited for the last phase and do not run yet
    std::vector<int> waiting;  // threads
    std::vector<Load> loads;
    Knowledge current, complete;  // what those know that have arrived in this phase, or before it

    int initialiser;  // a thread
    uint32_t init_time, fence_time;
    bool is_fenced;
    Where where;
  };

  Barrier& find(const void* pointer, const char* name, const Where& where);
  void settle(Barrier& barrier, const Where& where);
  void complete(Barrier& barrier, const Where& where);
  static void land(Barrier& barrier, const Load& load);

  Barrier barriers_[kMaxBarriers];
  int count_ = 0;
};

extern Mbarriers mbarriers;

}  // namespace fastattn::emulator
