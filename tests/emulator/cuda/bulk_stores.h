// TMA from shared to global memory: what one thread has in flight.
#pragma once

#include <stddef.h>

#include <vector>

#include "failure.h"
#include "tensor_maps.h"
#include "turns.h"

namespace fastattn::emulator {

class BulkStores {
 public:
  // To the box of a tensor; or, if they are to be added, floats.
  void issue(const Transfer& transfer, bool adds, const Where& where);
  void commit() {
    ++committed_;
  }
  // Of all but the newest `pending` groups shared memory has been read; or all is done.
  void wait(int pending, bool for_reads);

  // The sums that are done for this thread: its own that it has waited for, and those of others.
  const Sums& known_sums() const {
    return known_sums_;
  }
  void learn_sums(const Sums& sums) {
    known_sums_.insert(sums.begin(), sums.end());
  }

  // Shared memory must have been read.
  void end_thread();
  void clear();

 private:
  struct Part {
    const void* shared;
    unsigned char* global;
    int first, last;
    unsigned char data[kTransferChunk];
  };
  struct Store {
    std::vector<Part> parts;
    int group;
    bool adds;
    uint64_t sum;  // its number, if it is one
    bool is_read, is_done, is_awaited;
    Where where;
  };

  static void end_read(Store& store);
  static void finish(Store& store);

  std::vector<Store> stores_;
  Sums known_sums_;
  int committed_ = 0;
};

}  // namespace fastattn::emulator
