// The threads of a block, and how they take turns: one runs until it waits for others. A warp runs
// until all of its lanes wait; now and then another one goes first. Whatever waits is released all
// at once, and goes on in a new order.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <vector>

#include "async_copies.h"
#include "bulk_stores.h"
#include "failure.h"
#include "fiber.h"
#include "order.h"
#include "random.h"

namespace fastattn::emulator {

// What threads do together. For a warp or a warpgroup, run() gets what each lane gave, when all
// have arrived.
struct Operation {
  const char* name;
  bool orders_memory;
  void (*run)(void* const* operands);
};

// Threads that have arrived, and what at.
struct Rendezvous {
  int arrived = 0;
  int first = 0;  // the number of a thread that waits
  const Operation* operation = nullptr;
  Where where;
};

struct Warp;

// What a thread has to do with barriers other than the block's, and with TMA.
struct Beyond {
  Knowledge known;
  std::vector<uint32_t> fences;  // when it has called fence_async_proxy
  BulkStores stores;
};

struct Thread {
  Fiber fiber;
  Warp* warp;
  uint3 index;
  int number, lane;
  const Operation* operation;  // that it waits at
  Where where;
  AsyncCopies copies;
  Beyond* beyond;
};

struct Warp {
  int number;
  Thread* threads;  // 32
  uint32_t ready;   // by their position in `order`: lanes that can run
  LaneOrder order;
  uint32_t time;    // when its memory was last ordered
  uint32_t exited;  // lanes
  Rendezvous meeting;
  void* operands[kLanes];
  bool has_learnt, is_uneven;  // lanes know something; some more than others
};

struct Group {
  Rendezvous meeting;
  bool has_learnt;  // some thread of it, since find_common()
  void* operands[kGroupThreads];
};

class Block {
 public:
  // Runs a block from its first line to its last; false: it failed.
  bool run(const Call& call, uint3 index, uint3 shape, Random& random);

  // The lanes of a warp meet.
  void join_warp(const Operation& operation, void* operands, const Where& where);
  // Those of a warpgroup. Orders no memory.
  void join_group(const Operation& operation, void* operands, const Where& where);
  // All threads meet; whether any of them voted.
  bool join_block(const Operation& operation, bool vote, const Where& where);

  // The steps of such meetings, for those that end otherwise. Whether the current thread is the
  // last of its warp; then the caller releases the warp, now or later.
  bool arrive_in_warp(const Operation& operation, void* operands, const Where& where);
  void release(Warp& warp);
  // The current thread stops, until it is released or woken.
  void stop(const Operation& operation, const Where& where);
  void let_others_run();
  void wake(Thread& thread);
  // Sometimes others run before the current thread goes on.
  void make_way();
  void shuffle_warps_sometimes();

  // Stops all threads where they are; they are never resumed.
  [[noreturn]] void abandon();

  Thread& current() {
    return *current_;
  }
  Thread& thread(int number) {
    return threads_[number];
  }
  Warp& warp(int number) {
    return warps_[number];
  }
  int thread_count() const {
    return thread_count_;
  }
  Random& random() {
    return *random_;
  }

  // Time passes where memory is ordered. What happened before settled_time() happened before all
  // that the block does now; first_time() is its beginning.
  uint32_t now() const {
    return clock_;
  }
  uint32_t settled_time() const {
    return settled_time_;
  }
  uint32_t first_time() const {
    return first_time_;
  }

  // Whether threads may be ordered otherwise than by the block's barriers. It is so from the first
  // time on that a kernel asks for it, and in all later blocks of that kernel.
  bool has_order() const {
    return has_order_;
  }
  void use_order();
  // What a thread has done and knows of, into `to`; and the other way.
  void publish(const Thread& thread, Knowledge& to);
  void learn(Thread& thread, const Knowledge& from);
  // What all threads of the current one's warpgroup know, and whether it may have changed.
  void find_common(Knowledge& common);
  bool has_group_learnt() const {
    return groups_[current_->number / kGroupThreads].has_learnt;
  }
  // A new time, so that what follows is not what has been.
  uint32_t advance() {
    return ++clock_;
  }
  uint32_t fences_of_current() const {
    return has_order_ ? static_cast<uint32_t>(current_->beyond->fences.size()) : 0;
  }
  void restart_clock() {
    clock_ = 0;
  }

 private:
  static void thread_main();
  void begin(uint3 index, uint3 shape, Random& random);
  void begin_order();
  void leave_thread();
  void check_nobody_waits_for(Thread& thread);
  void release_all();
  void share_knowledge(Warp& warp);
  void shuffle_warps();
  Thread* next_thread();
  void make_current(Thread& thread);
  [[noreturn]] void fail_deadlocked();

  Thread threads_[kMaxThreads];
  Warp warps_[kMaxWarps];
  Group groups_[kMaxGroups];
  Beyond beyond_[kMaxThreads];
  Thread* current_ = nullptr;
  Warp* warp_ = nullptr;  // whose lanes run
  Order warp_order_;
  Random* random_ = nullptr;
  Fiber host_;
  const Call* call_ = nullptr;
  Rendezvous meeting_;
  bool vote_ = false, result_ = false, failed_ = false;
  int thread_count_ = 0, warp_count_ = 0, exited_ = 0, prepared_ = 0;
  uint64_t restlessness_ = 0;  // how often, of 8 times, a warp that could go on makes way
  uint32_t clock_ = 0, settled_time_ = 0, first_time_ = 0;
  bool has_order_ = false;
};

extern Block block;

}  // namespace fastattn::emulator
