#include "block.h"

#include <algorithm>
#include <bit>
#include <map>
#include <string>
#include <tuple>
#include <unordered_set>

#include "launch.h"
#include "mbarriers.h"
#include "named_barriers.h"
#include "products.h"
#include "register_pool.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastattn::emulator {

Block block;

namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr Operation kExit = {"its end", false, nullptr};

// Whoever arrives must want what those want that wait.
void arrive(Rendezvous& meeting, Thread& thread, const char* group, const Operation& operation,
            const Where& where) {
  thread.operation = &operation;
  thread.where = where;
  if (meeting.arrived++ == 0) {
    meeting.operation = &operation;
    meeting.where = where;
    meeting.first = thread.number;
  } else if (meeting.operation != &operation || !is_same_place(meeting.where, where)) [[unlikely]] {
    fail(where, "divergence: %s, while thread %d of the same %s waits at %s (%s:%u)",
         operation.name, meeting.first, group, meeting.operation->name, meeting.where.file_name(),
         meeting.where.line());
  }
}

}  // namespace

// ---- Taking turns -------------------------------------------------------------------------------

void Block::thread_main() {
  for (;;) {
    block.call_->invoke(block.call_->closure);
    block.leave_thread();
  }
}

void Block::make_current(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
}

// The next in turn, or none where all have ended.
Thread* Block::next_thread() {
  for (int k = 0; warp_->ready == 0; ++k) {
    if (k == warp_count_) {
      if (exited_ < thread_count_) fail_deadlocked();
      return nullptr;
    }
    warp_ = &warps_[warp_order_[static_cast<uint64_t>(k)]];
  }
  const auto position = static_cast<uint32_t>(std::countr_zero(warp_->ready));
  warp_->ready &= warp_->ready - 1;
  return warp_->threads + warp_->order[position];
}

// Returns when it is the caller's turn again.
void Block::let_others_run() {
  Thread& self = *current_;
  Thread* const next = next_thread();
  if (next == &self) return;
  if (next != nullptr) make_current(*next);
  Fiber::switch_between(self.fiber, next != nullptr ? next->fiber : host_);
}

void Block::release(Warp& warp) {
  warp.order.shuffle(*random_);
  warp.ready = kAllLanes;
}

void Block::release_all() {
  settled_time_ = ++clock_;
  for (Group& group : groups_) group.has_learnt = true;
  for (int w = 0; w < warp_count_; ++w) {
    warps_[w].time = clock_;
    release(warps_[w]);
    if (!warps_[w].has_learnt) continue;
    warps_[w].has_learnt = warps_[w].is_uneven = false;
    for (int lane = 0; lane < kLanes; ++lane) warps_[w].threads[lane].beyond->known.forget();
  }
  shuffle_warps();
}

void Block::shuffle_warps() {
  warp_order_ = Order(static_cast<uint64_t>(warp_count_), *random_);
  warp_ = &warps_[warp_order_[0]];
}

void Block::shuffle_warps_sometimes() {
  if (random_->next() % 8 < restlessness_) shuffle_warps();
}

void Block::stop(const Operation& operation, const Where& where) {
  current_->operation = &operation;
  current_->where = where;
  let_others_run();
}

void Block::wake(Thread& thread) {
  uint32_t position = 0;
  while (thread.warp->order[position] != static_cast<uint32_t>(thread.lane)) ++position;
  thread.warp->ready |= 1u << position;
}

void Block::make_way() {
  if (random_->next() % 8 >= restlessness_) return;
  wake(*current_);
  shuffle_warps();
  let_others_run();
}

// ---- Meeting ------------------------------------------------------------------------------------

bool Block::arrive_in_warp(const Operation& operation, void* operands, const Where& where) {
  Thread& self = *current_;
  Warp& warp = *self.warp;
  if (warp.exited != 0) [[unlikely]] {
    fail(where, "divergence: %s, but lane %d of warp %d has ended", operation.name,
         std::countr_zero(warp.exited), warp.number);
  }
  arrive(warp.meeting, self, "warp", operation, where);
  warp.operands[self.lane] = operands;
  if (warp.meeting.arrived < kLanes) return false;
  warp.meeting.arrived = 0;
  return true;
}

void Block::join_warp(const Operation& operation, void* operands, const Where& where) {
  if (arrive_in_warp(operation, operands, where)) {
    Warp& warp = *current_->warp;
    if (operation.run != nullptr) operation.run(warp.operands);
    if (operation.orders_memory) {
      warp.time = ++clock_;
      groups_[warp.number * kLanes / kGroupThreads].has_learnt = true;
      if (warp.is_uneven) share_knowledge(warp);
    }
    release(warp);
    shuffle_warps_sometimes();
  }
  let_others_run();
}

void Block::join_group(const Operation& operation, void* operands, const Where& where) {
  use_order();
  Thread& self = *current_;
  const int number = self.number / kGroupThreads, first_warp = number * kGroupThreads / kLanes;
  if ((number + 1) * kGroupThreads > thread_count_) {
    fail(where, "%s, but warpgroup %d has %d threads alone", operation.name, number,
         thread_count_ - number * kGroupThreads);
  }
  for (Warp* warp = &warps_[first_warp]; warp < &warps_[first_warp] + 4; ++warp) {
    if (warp->exited == 0) continue;
    fail(where, "divergence: %s, but lane %d of warp %d has ended", operation.name,
         std::countr_zero(warp->exited), warp->number);
  }
  Group& group = groups_[number];
  arrive(group.meeting, self, "warpgroup", operation, where);
  group.operands[self.number % kGroupThreads] = operands;
  if (group.meeting.arrived == kGroupThreads) {
    group.meeting.arrived = 0;
    operation.run(group.operands);
    for (int w = 0; w < 4; ++w) release(warps_[first_warp + w]);
    shuffle_warps_sometimes();
  }
  let_others_run();
}

bool Block::join_block(const Operation& operation, bool vote, const Where& where) {
  if (exited_ > 0) [[unlikely]] {
    fail(where, "deadlock: %s, but %d threads of the block have ended", operation.name, exited_);
  }
  if (meeting_.arrived == 0) vote_ = false;
  arrive(meeting_, *current_, "block", operation, where);
  vote_ |= vote;
  if (meeting_.arrived == thread_count_) {
    meeting_.arrived = 0;
    result_ = vote_;
    release_all();
  }
  let_others_run();
  return result_;
}

// The end of a thread; returns where the next block begins.
void Block::leave_thread() {
  Thread& self = *current_;
  Warp& warp = *self.warp;
  self.copies.end_thread();
  if (has_order_) {
    self.beyond->stores.end_thread();
    products_of(self).end_thread();
  }
  self.operation = &kExit;
  warp.exited |= 1u << self.lane;
  ++exited_;
  check_nobody_waits_for(self);
  if (exited_ == thread_count_ && has_order_) {
    mbarriers.end_block();
    named_barriers.end_block();
  }
  let_others_run();
}

void Block::check_nobody_waits_for(Thread& thread) {
  const Warp& warp = *thread.warp;
  const Rendezvous& group = groups_[thread.number / kGroupThreads].meeting;
  for (const Rendezvous* meeting : {&warp.meeting, &group}) {
    if (meeting->arrived == 0) continue;
    fail(meeting->where, "divergence: %s, but lane %d of warp %d has ended",
         meeting->operation->name, thread.lane, warp.number);
  }
  if (meeting_.arrived > 0) [[unlikely]] {
    fail(meeting_.where, "deadlock: thread %d waits at %s, but this thread has ended",
         meeting_.first, meeting_.operation->name);
  }
}

void Block::fail_deadlocked() {
  using Place = std::tuple<std::string, std::string, unsigned>;
  static std::map<Place, std::pair<int, int>> waiting;  // how many, the first of them
  static std::string text;
  waiting.clear();
  text.clear();
  for (int t = 0; t < thread_count_; ++t) {
    const Thread& thread = threads_[t];
    const Place place = {thread.operation->name, thread.where.file_name(), thread.where.line()};
    ++waiting.try_emplace(place, 0, t).first->second.first;
  }
  for (const auto& [place, who] : waiting) {
    text += text.empty() ? "" : ", ";
    text += std::to_string(who.first) + " threads (" + std::to_string(who.second) + ", ...) at " +
            std::get<0>(place) + " (" + std::get<1>(place) + ":" +
            std::to_string(std::get<2>(place)) + ")";
  }
  if (has_order_) mbarriers.describe_waiting(text);
  fail(current_->where, "deadlock: %s", text.c_str());
}

// ---- Order --------------------------------------------------------------------------------------

namespace {

std::unordered_set<const void*>& kernels_with_order() {
  static std::unordered_set<const void*> kernels;
  return kernels;
}

}  // namespace

void Block::begin_order() {
  for (int t = 0; t < thread_count_; ++t) {
    beyond_[t].known.forget();
    beyond_[t].fences.clear();
    beyond_[t].stores.clear();
  }
  mbarriers.begin_block();
  named_barriers.begin_block();
  begin_products();
  register_pool.begin_block(thread_count_);
}

// NOTE: of reads by several threads before that nobody knows which they were: they count as
// ordered.
void Block::use_order() {
  if (has_order_) return;
  if (running_arch() < 90) {
    fail(current_->where, "an instruction of sm_90a on a device of sm_%d", running_arch());
  }
  kernels_with_order().insert(call_->kernel);
  has_order_ = true;
  settled_time_ = ++clock_;
  begin_order();
}

void Block::publish(const Thread& thread, Knowledge& to) {
  to.learn(thread.beyond->known);
  for (int lane = 0; lane < kLanes; ++lane) {
    to.learn(static_cast<Actor>(thread.warp->threads[lane].number), thread.warp->time);
  }
  to.learn(static_cast<Actor>(thread.number), ++clock_);
}

void Block::learn(Thread& thread, const Knowledge& from) {
  thread.beyond->known.learn(from);
  groups_[thread.number / kGroupThreads].has_learnt = true;
  thread.warp->has_learnt = thread.warp->is_uneven = true;
}

void Block::share_knowledge(Warp& warp) {
  static Knowledge all;
  all.forget();
  for (int lane = 0; lane < kLanes; ++lane) all.learn(warp.threads[lane].beyond->known);
  for (int lane = 0; lane < kLanes; ++lane) warp.threads[lane].beyond->known.learn(all);
  warp.is_uneven = false;
}

void Block::find_common(Knowledge& common) {
  static Knowledge of_warp;
  const int first_warp = current_->number / kGroupThreads * (kGroupThreads / kLanes);
  groups_[current_->number / kGroupThreads].has_learnt = false;
  common.forget();
  for (int w = 0; w < kGroupThreads / kLanes; ++w) {
    const Warp& warp = warps_[first_warp + w];
    of_warp.forget();
    of_warp.learn(warp.threads[0].beyond->known);
    for (int lane = 1; lane < kLanes; ++lane) {
      of_warp.keep_common(warp.threads[lane].beyond->known);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      of_warp.learn(static_cast<Actor>(warp.threads[lane].number), warp.time);
    }
    if (w == 0) {
      common.learn(of_warp);
    } else {
      common.keep_common(of_warp);
    }
  }
}

// ---- A block ------------------------------------------------------------------------------------

void Block::begin(uint3 index, uint3 shape, Random& random) {
  blockIdx = index;
  random_ = &random;
  thread_count_ = static_cast<int>(shape.x * shape.y * shape.z);
  warp_count_ = thread_count_ / kLanes;
  exited_ = 0;
  failed_ = false;
  meeting_.arrived = 0;
  const uint64_t choices[] = {0, 1, 8};
  restlessness_ = choices[random.next() % 3];
  for (int t = 0; t < thread_count_; ++t) {
    Thread& thread = threads_[t];
    const auto number = static_cast<unsigned>(t);
    thread.index = {number % shape.x, number / shape.x % shape.y, number / shape.x / shape.y};
    thread.number = t;
    thread.lane = t % kLanes;
    thread.warp = &warps_[t / kLanes];
    thread.where = {};
    thread.beyond = &beyond_[t];
    if (t >= prepared_) {
      thread.copies.clear();
      thread.fiber.prepare(thread_main);
    }
  }
  prepared_ = std::max(prepared_, thread_count_);
  for (int w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    warp.number = w;
    warp.threads = &threads_[w * kLanes];
    warp.exited = 0;
    warp.meeting.arrived = 0;
    warp.has_learnt = warp.is_uneven = false;
  }
  for (Group& group : groups_) group.meeting.arrived = 0;
  first_time_ = ++clock_;
  has_order_ = kernels_with_order().contains(call_->kernel);
  if (has_order_) begin_order();
  release_all();
}

bool Block::run(const Call& call, uint3 index, uint3 shape, Random& random) {
  call_ = &call;
  begin(index, shape, random);
  make_current(*next_thread());
  Fiber::switch_between(host_, current_->fiber);
  return !failed_;
}

void Block::abandon() {
  failed_ = true;
  prepared_ = 0;
  Fiber::switch_between(current_->fiber, host_);
  __builtin_unreachable();
}

}  // namespace fastattn::emulator
