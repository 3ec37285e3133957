// bar.sync and bar.arrive: barriers of some warps of the block.
#pragma once

#include <stdint.h>

#include <vector>

#include "failure.h"
#include "order.h"

namespace fastattn::emulator {

struct Operation;
struct Warp;

class NamedBarriers {
 public:
  // The current thread's warp arrives, and waits until `threads` have.
  void sync(int id, int threads, const Where& where);
  // And whether any of those who wait voted.
  bool sync_or(int id, int threads, bool vote, const Where& where);
  void arrive(int id, int threads, const Where& where);

  void begin_block();
  // Nobody may be waiting for more.
  void end_block();

 private:
  struct Barrier {
    int arrived = 0, threads = 0;  // of this phase
    bool vote = false;
    uint32_t warps = 0;        // that have arrived, a bit each
    std::vector<int> waiting;  // warps
    Knowledge known;
    Where where;  // of the first
  };
  static constexpr int kBarriers = 16;

  void meet(const Operation& operation, int id, int threads, bool waits, bool vote,
            const Where& where);
  void enter(Warp& warp, const Operation& operation, int id, int threads, bool waits,
             const Where& where);
  void complete(Barrier& barrier);

  Barrier barriers_[kBarriers];
  bool votes_[kMaxWarps] = {};  // what the last barrier of each warp found
};

extern NamedBarriers named_barriers;

}  // namespace fastattn::emulator
