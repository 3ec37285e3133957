#include "bulk_stores.h"

#include <string.h>

#include "block.h"
#include "shared_memory.h"

namespace fastattn::emulator {

// Nobody may write to the source before it has been read, so it does not matter when that is. What
// is written arrives at once, or only when it must have.
void BulkStores::issue(const Transfer& transfer, bool adds, const Where& where) {
  block.use_order();
  const uint64_t sum = adds ? turns.add(transfer.global, known_sums_, where) : 0;
  stores_.push_back({{}, committed_, adds, sum, false, false, false, where});
  Store& store = stores_.back();
  TransferChunks chunks(transfer);
  for (TransferChunk chunk; chunks.next(&chunk);) {
    shared.begin_async_read(chunk.shared, where);
    Part part = {chunk.shared, chunk.global, chunk.first, chunk.last, {}};
    memcpy(part.data, chunk.shared, sizeof(part.data));
    store.parts.push_back(part);
  }
  if (block.random().next() % 2 == 0) finish(store);
  block.make_way();
}

void BulkStores::end_read(Store& store) {
  if (store.is_read) return;
  store.is_read = true;
  const auto self = static_cast<Actor>(block.current().number);
  for (const Part& part : store.parts) shared.end_async_read(part.shared, self);
}

void BulkStores::finish(Store& store) {
  if (store.is_done) return;
  store.is_done = true;
  for (const Part& part : store.parts) {
    if (!store.adds) {
      memcpy(part.global + part.first, part.data + part.first,
             static_cast<size_t>(part.last - part.first));
      continue;
    }
    for (size_t i = 0; i < sizeof(part.data) / sizeof(float); ++i) {
      float term;
      memcpy(&term, part.data + i * sizeof(float), sizeof(float));
      reinterpret_cast<float*>(part.global)[i] += term;
    }
  }
}

void BulkStores::wait(int pending, bool for_reads) {
  for (Store& store : stores_) {
    if (store.group >= committed_ - pending) continue;
    end_read(store);
    if (for_reads) continue;
    finish(store);
    store.is_awaited = true;
    if (store.adds) known_sums_.insert(store.sum);
  }
  std::erase_if(stores_, [](const Store& store) { return store.is_awaited; });
}

void BulkStores::end_thread() {
  for (Store& store : stores_) {
    if (!store.is_read) {
      fail(
          store.where,
          "the thread ends with a store from shared memory not waited for, which may not have been "
          "read");
    }
    finish(store);
  }
  clear();
}

void BulkStores::clear() {
  stores_.clear();
  known_sums_.clear();
  committed_ = 0;
}

}  // namespace fastattn::emulator
