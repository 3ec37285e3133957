// TMA from shared to global memory: what one thread has in flight.
#pragma once

#include <stddef.h>

#include <vector>

#include "failure.h"
#include "tensor_maps.h"

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
    bool adds, is_read, is_done;
    Where where;
  };

  static void end_read(Store& store);
  static void finish(Store& store);

  std::vector<Store> stores_;
  int committed_ = 0;
};

}  // namespace fastattn::emulator
