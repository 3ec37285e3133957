#include "mbarriers.h"

#include <string.h>

#include <algorithm>

#include "block.h"
#include "shared_memory.h"

namespace fastattn::emulator {

Mbarriers mbarriers;

namespace {

constexpr Operation kWait = {"mbarrier_wait", false, nullptr};
constexpr int64_t kMaxBytes = (1 << 20) - 1;  // that a barrier can count

uint32_t address_of(const void* pointer) {
  return shared.address_of(pointer);
}

// Whether the current thread knows all that `known` has of the actor: more than `time`.
bool is_ordered_after(int thread, uint32_t time) {
  const Thread& self = block.current();
  const bool is_of_warp = thread / kLanes == self.warp->number;
  return time < block.settled_time() || thread == self.number ||
         (is_of_warp && time < self.warp->time) ||
         self.beyond->known.has(static_cast<Actor>(thread), time);
}

}  // namespace

void Mbarriers::init(void* pointer, int arrivals, const Where& where) {
  block.use_order();
  if (address_of(pointer) % 8 != 0) {
    fail(where, "mbarrier_init at address %u, which is no multiple of 8", address_of(pointer));
  }
  if (arrivals < 1 || arrivals > kMaxBytes) {
    fail(where, "mbarrier_init for %d arrivals: 1 at least", arrivals);
  }
  for (int i = 0; i < count_; ++i) {
    if (barriers_[i].pointer != pointer) continue;
    fail(where, "mbarrier_init of what is an mbarrier already (%s:%u)",
         barriers_[i].where.file_name(), barriers_[i].where.line());
  }
  if (count_ == kMaxBarriers) fail(where, "more than %d mbarriers", kMaxBarriers);
  shared.make_barrier(pointer, where);
  Barrier& barrier = barriers_[count_];
  barrier.pointer = pointer;
  barrier.actor = static_cast<Actor>(kFirstBarrier + count_);
  barrier.arrivals = barrier.missing = arrivals;
  barrier.bytes = 0;
  barrier.phase = 0;
  barrier.unseen = 0;
  barrier.waiting.clear();
  barrier.loads.clear();
  barrier.current.forget();
  barrier.complete.forget();
  barrier.initialiser = block.current().number;
  barrier.init_time = block.now();
  barrier.is_fenced = false;
  barrier.where = where;
  ++count_;
}

void Mbarriers::fence_init() {
  for (int i = 0; i < count_; ++i) {
    if (barriers_[i].initialiser != block.current().number || barriers_[i].is_fenced) continue;
    barriers_[i].is_fenced = true;
    barriers_[i].fence_time = block.now();
  }
}

Mbarriers::Barrier& Mbarriers::find(const void* pointer, const char* name, const Where& where) {
  block.use_order();
  Barrier* const end = barriers_ + count_;
  Barrier* const found =
      std::find_if(barriers_, end, [&](const Barrier& other) { return other.pointer == pointer; });
  if (found == end) fail(where, "%s of an mbarrier that is not initialised", name);
  if (!is_ordered_after(found->initialiser, found->init_time)) {
    fail(where, "race: %s of an mbarrier that thread %d has initialised (%s:%u), unordered", name,
         found->initialiser, found->where.file_name(), found->where.line());
  }
  return *found;
}

void Mbarriers::arrive(void* pointer, int bytes, const char* name, const Where& where) {
  Barrier& barrier = find(pointer, name, where);
  if (bytes < 0 || barrier.bytes + bytes > kMaxBytes) {
    fail(where, "%s of %d bytes: a phase has 0 to %lld", name, bytes,
         static_cast<long long>(kMaxBytes));
  }
  if (barrier.missing == 0) {
    fail(
        where,
        "%s at an mbarrier whose phase %u has had all of its %d arrivals and still waits for bytes",
        name, barrier.phase, barrier.arrivals);
  }
  barrier.bytes += bytes;
  --barrier.missing;
  block.publish(block.current(), barrier.current);
  if (!barrier.waiting.empty() || barrier.bytes == 0) settle(barrier, where);
  block.make_way();
}

void Mbarriers::load(const Transfer& transfer, void* pointer, const Where& where) {
  Barrier& barrier = find(pointer, "a copy", where);
  if (!barrier.is_fenced || !is_ordered_after(barrier.initialiser, barrier.fence_time)) {
    fail(where,
         "a copy for an mbarrier that thread %d has initialised (%s:%u) without an "
         "mbarrier_fence_init of its own before the copy",
         barrier.initialiser, barrier.where.file_name(), barrier.where.line());
  }
  TransferChunks chunks(transfer);
  for (TransferChunk chunk; chunks.next(&chunk);) shared.begin_async_write(chunk.shared, where);
  barrier.loads.push_back({transfer, where});
  if (!barrier.waiting.empty()) settle(barrier, where);
  block.make_way();
}

// Global memory is read as late as can be.
void Mbarriers::land(Barrier& barrier, const Load& load) {
  TransferChunks chunks(load.transfer);
  for (TransferChunk chunk; chunks.next(&chunk);) {
    unsigned char data[kTransferChunk] = {};
    memcpy(data + chunk.first, chunk.global + chunk.first,
           static_cast<size_t>(chunk.last - chunk.first));
    shared.end_async_write(chunk.shared, data, barrier.actor);
  }
  barrier.bytes -= load.transfer.bytes();
  barrier.current.learn(barrier.actor, block.advance());
}

// Ends the phase if it can end: all have arrived, and copies in flight bring what is announced.
void Mbarriers::settle(Barrier& barrier, const Where& where) {
  if (barrier.missing > 0) return;
  while (barrier.bytes > 0 && !barrier.loads.empty()) {
    const size_t chosen = block.random().next() % barrier.loads.size();
    land(barrier, barrier.loads[chosen]);
    barrier.loads.erase(barrier.loads.begin() + static_cast<ptrdiff_t>(chosen));
  }
  if (barrier.bytes == 0) complete(barrier, where);
}

void Mbarriers::complete(Barrier& barrier, const Where& where) {
  if (barrier.unseen > 0) {
    fail(
        where,
        "phase %u of the mbarrier at address %u is complete while %d threads that wait for the one "
        "before have not seen it end: they would wait for ever",
        barrier.phase, address_of(barrier.pointer), barrier.unseen);
  }
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  barrier.complete.learn(barrier.current);
  barrier.current.forget();
  barrier.unseen = static_cast<int>(barrier.waiting.size());
  for (const int thread : barrier.waiting) block.wake(block.thread(thread));
  barrier.waiting.clear();
}

void Mbarriers::wait(void* pointer, int parity, const Where& where) {
  Barrier& barrier = find(pointer, kWait.name, where);
  if (parity != 0 && parity != 1) fail(where, "mbarrier_wait for parity %d", parity);
  const auto awaited = static_cast<uint32_t>(parity);
  if (barrier.phase % 2 == awaited) settle(barrier, where);
  if (barrier.phase % 2 == awaited) {
    barrier.waiting.push_back(block.current().number);
    block.stop(kWait, where);
    --barrier.unseen;
  }
  block.learn(block.current(), barrier.complete);
}

void Mbarriers::end_block() {
  for (int i = 0; i < count_; ++i) {
    if (barriers_[i].loads.empty()) continue;
    fail(barriers_[i].loads.front().where,
         "the block ends with %zu copies that nobody has waited for, this one the first",
         barriers_[i].loads.size());
  }
}

void Mbarriers::describe_waiting(std::string& text) const {
  for (int i = 0; i < count_; ++i) {
    const Barrier& barrier = barriers_[i];
    if (barrier.waiting.empty()) continue;
    text += "; the mbarrier at address " + std::to_string(address_of(barrier.pointer)) + " (" +
            barrier.where.file_name() + ":" + std::to_string(barrier.where.line()) +
            ") lacks in phase " + std::to_string(barrier.phase) + " " +
            std::to_string(barrier.missing) + " arrivals and " + std::to_string(barrier.bytes) +
            " bytes, with " + std::to_string(barrier.loads.size()) + " copies in flight";
  }
}

}  // namespace fastattn::emulator
