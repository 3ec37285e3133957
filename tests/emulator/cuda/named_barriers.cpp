#include "named_barriers.h"

#include "block.h"

namespace fastattn::emulator {

NamedBarriers named_barriers;

namespace {

constexpr Operation kSync = {"sync_named", false, nullptr};
constexpr Operation kArrive = {"arrive_named", false, nullptr};
constexpr Operation kSyncOr = {"sync_named_or", false, nullptr};

struct Operands {
  int id, threads;
  bool vote;
};

}  // namespace

void NamedBarriers::begin_block() {
  for (Barrier& barrier : barriers_) {
    barrier.arrived = 0;
    barrier.warps = 0;
    barrier.vote = false;
    barrier.waiting.clear();
    barrier.known.forget();
  }
}

void NamedBarriers::end_block() {
  for (int id = 0; id < kBarriers; ++id) {
    const Barrier& barrier = barriers_[id];
    if (barrier.arrived == 0) continue;
    fail(barrier.where, "the block ends with %d of %d threads at named barrier %d", barrier.arrived,
         barrier.threads, id);
  }
}

void NamedBarriers::sync(int id, int threads, const Where& where) {
  meet(kSync, id, threads, true, false, where);
}

bool NamedBarriers::sync_or(int id, int threads, bool vote, const Where& where) {
  meet(kSyncOr, id, threads, true, vote, where);
  return votes_[block.current().warp->number];
}

void NamedBarriers::arrive(int id, int threads, const Where& where) {
  meet(kArrive, id, threads, false, false, where);
}

void NamedBarriers::complete(Barrier& barrier) {
  for (const int number : barrier.waiting) {
    Warp& warp = block.warp(number);
    votes_[number] = barrier.vote;
    for (int lane = 0; lane < kLanes; ++lane) block.learn(warp.threads[lane], barrier.known);
    block.release(warp);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.warps = 0;
  barrier.vote = false;
  barrier.known.forget();
}

// All lanes of a warp are there, with the same operands.
void NamedBarriers::enter(Warp& warp, const Operation& operation, int id, int threads, bool waits,
                          const Where& where) {
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.where = where;
  } else if (barrier.threads != threads) {
    fail(where, "%s for %d threads at barrier %d, where others wait for %d (%s:%u)", operation.name,
         threads, id, barrier.threads, barrier.where.file_name(), barrier.where.line());
  }
  if (barrier.warps >> warp.number & 1) {
    fail(where, "%s: warp %d is at barrier %d already, and others are not yet", operation.name,
         warp.number, id);
  }
  for (int lane = 0; lane < kLanes; ++lane) block.publish(warp.threads[lane], barrier.known);
  barrier.arrived += kLanes;
  barrier.warps |= 1u << warp.number;
  if (waits) {
    barrier.waiting.push_back(warp.number);
  } else {
    block.release(warp);
  }
  if (barrier.arrived == barrier.threads) complete(barrier);
}

void NamedBarriers::meet(const Operation& operation, int id, int threads, bool waits, bool vote,
                         const Where& where) {
  block.use_order();
  if (id < 1 || id >= kBarriers) fail(where, "%s at barrier %d: 1 to 15", operation.name, id);
  if (threads < kLanes || threads % kLanes != 0 || threads > block.thread_count()) {
    fail(where, "%s for %d threads: whole warps of the block", operation.name, threads);
  }
  Operands operands = {id, threads, vote};
  if (block.arrive_in_warp(operation, &operands, where)) {
    Warp& warp = *block.current().warp;
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto& other = *static_cast<const Operands*>(warp.operands[lane]);
      barriers_[id].vote |= other.vote;
      if (other.id == id && other.threads == threads) continue;
      fail(where, "divergence: %s at barriers %d and %d in a warp", operation.name, id, other.id);
    }
    enter(warp, operation, id, threads, waits, where);
    block.shuffle_warps_sometimes();
  }
  block.let_others_run();
}

}  // namespace fastattn::emulator
