#include "register_pool.h"

#include <algorithm>

#include "block.h"

namespace fastattn::emulator {

RegisterPool register_pool;

namespace {

constexpr int kRegisters = 64 << 10, kMostOfThread = 256;

int group_of_current() {
  return block.current().number / kGroupThreads;
}

}  // namespace

// A kernel that is compiled for so many threads has at most so many registers.
void RegisterPool::begin_block(int threads) {
  const int registers = std::min(kRegisters / threads / 8 * 8, kMostOfThread);
  for (Group& group : groups_) {
    group.registers = registers;
    group.wanted = 0;
    group.waiting.clear();
  }
  free_ = kRegisters - registers * threads;
}

void RegisterPool::grant() {
  for (Group& group : groups_) {
    const int more = (group.wanted - group.registers) * kGroupThreads;
    if (group.wanted == 0 || more > free_) continue;
    free_ -= more;
    group.registers = group.wanted;
    group.wanted = 0;
    for (const int thread : group.waiting) block.wake(block.thread(thread));
    group.waiting.clear();
  }
}

void RegisterPool::run_give_up(void* const* operands) {
  Group& group = register_pool.groups_[group_of_current()];
  const int registers = *static_cast<const int*>(operands[0]);
  register_pool.free_ += (group.registers - registers) * kGroupThreads;
  group.registers = registers;
  register_pool.grant();
}

void RegisterPool::run_demand(void* const* operands) {
  register_pool.groups_[group_of_current()].wanted = *static_cast<const int*>(operands[0]);
  register_pool.grant();
}

void RegisterPool::give_up(int registers, const Where& where) {
  static constexpr Operation kOperation = {"fewer_registers", false, run_give_up};
  block.use_order();
  const int had = groups_[group_of_current()].registers;
  if (registers > had) {
    fail(where, "fewer_registers<%d> by a thread that has %d", registers, had);
  }
  block.join_group(kOperation, &registers, where);
}

void RegisterPool::demand(int registers, const Where& where) {
  static constexpr Operation kOperation = {"more_registers", false, run_demand};
  block.join_group(kOperation, &registers, where);
  Group& group = groups_[group_of_current()];
  if (group.wanted == 0) return;
  group.waiting.push_back(block.current().number);
  block.stop(kOperation, where);
}

}  // namespace fastattn::emulator
