// What happened before what, where it is not the whole block that has waited: vector clocks.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace fastattn::emulator {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr int kGroupThreads = 128, kMaxGroups = kMaxThreads / kGroupThreads;
constexpr int kMaxBarriers = 64;

// Who accesses shared memory: a thread, by its number; or what runs beside them, the products of a
// warpgroup and the copies that report to a barrier.
using Actor = uint16_t;
constexpr Actor kFirstGroup = kMaxThreads, kFirstBarrier = kFirstGroup + kMaxGroups;

// What one knows of: of each actor, all that it did before some time.
class Knowledge {
 public:
  void learn(Actor actor, uint32_t time) {
    uint32_t& known = times_[slot(actor)];
    known = std::max(known, time);
    size_ = std::max(size_, slot(actor) + 1);
  }

  void learn(const Knowledge& other) {
    for (int i = 0; i < other.size_; ++i) times_[i] = std::max(times_[i], other.times_[i]);
    size_ = std::max(size_, other.size_);
  }

  // Only what the other one knows as well stays.
  void keep_common(const Knowledge& other) {
    for (int i = 0; i < size_; ++i) times_[i] = std::min(times_[i], other.times_[i]);
  }

  void forget() {
    std::fill(times_, times_ + size_, 0);
    size_ = 0;
  }

  bool has(Actor actor, uint32_t time) const {
    return time < times_[slot(actor)];
  }

 private:
  static constexpr int kOthers = kMaxGroups + kMaxBarriers;

  // Threads come last, since most blocks have few.
  static int slot(Actor actor) {
    return actor < kMaxThreads ? kOthers + actor : actor - kMaxThreads;
  }

  int size_ = 0;  // beyond it, all are 0
  uint32_t times_[kOthers + kMaxThreads] = {};
};

}  // namespace fastattn::emulator
