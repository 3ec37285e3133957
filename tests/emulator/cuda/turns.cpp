#include "turns.h"

#include "block.h"

namespace fastattn::emulator {

Turns turns;

void Turns::begin_launch() {
  is_used_ = false;
  count_ = 0;
  newest_.clear();
  released_.clear();
}

uint32_t Turns::fetch_add(uint32_t* number, uint32_t value) {
  is_used_ = true;
  const uint32_t before = *number;
  *number += value;
  return before;
}

void Turns::release(uint32_t* number, uint32_t value) {
  is_used_ = true;
  released_[number] = block.current().beyond->stores.known_sums();
  *number = value;
}

// Blocks that have begun before this one have ended.
void Turns::await(const uint32_t* number, uint32_t least, const Where& where) {
  is_used_ = true;
  if (*number < least) {
    fail(where, "deadlock: await_global for %u at a number that is %u", least, *number);
  }
  block.current().beyond->stores.learn_sums(released_[number]);
}

uint64_t Turns::add(const void* place, const Sums& known, const Where& where) {
  const auto [newest, is_first] = newest_.try_emplace(place, count_);
  if (is_used_ && !is_first && !known.contains(newest->second)) {
    fail(where, "race: adds to global memory after another sum there, unordered");
  }
  newest->second = count_;
  return count_++;
}

}  // namespace fastattn::emulator
