// The threads of a block, and how they take turns: one runs until it waits for others. A warp runs
// until all of its lanes wait; now and then another one goes first. Whatever waits is released all
// at once, and goes on in a new order.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "async_copies.h"
#include "failure.h"
#include "fiber.h"
#include "random.h"

namespace fastattn::emulator {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;

// What threads do together. For a warp, run() gets what each lane gave, when all have arrived.
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

struct Thread {
  Fiber fiber;
  Warp* warp;
  uint3 index;
  int number, lane;
  const Operation* operation;  // that it waits at
  Where where;
  AsyncCopies copies;
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
};

class Block {
 public:
  // Runs a block from its first line to its last; false: it failed.
  bool run(const Call& call, uint3 index, uint3 shape, Random& random);

  // The lanes of a warp meet.
  void join_warp(const Operation& operation, void* operands, const Where& where);
  // All threads meet; whether any of them voted.
  bool join_block(const Operation& operation, bool vote, const Where& where);

  // Stops all threads where they are; they are never resumed.
  [[noreturn]] void abandon();

  Thread& current() {
    return *current_;
  }

  // Time passes where memory is ordered. What happened before block_time() happened before all
  // that the block does now.
  uint32_t now() const {
    return clock_;
  }
  uint32_t block_time() const {
    return block_time_;
  }
  void restart_clock() {
    clock_ = 0;
  }

 private:
  static void thread_main();
  void begin(uint3 index, uint3 shape, Random& random);
  void leave_thread();
  void release(Warp& warp);
  void release_all();
  void shuffle_warps();
  void let_others_run();
  Thread* next_thread();
  void make_current(Thread& thread);
  [[noreturn]] void fail_deadlocked();

  Thread threads_[kMaxThreads];
  Warp warps_[kMaxWarps];
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
  uint32_t clock_ = 0, block_time_ = 0;
};

extern Block block;

}  // namespace fastattn::emulator
