#include "async_copies.h"

#include <stdint.h>
#include <string.h>

#include "shared_memory.h"

namespace fastattn::emulator {

void AsyncCopies::issue(void* target, const void* global, int bytes, const Where& where) {
  if (bytes < 0 || bytes > 16) fail(where, "cp.async of %d bytes: it takes 0 to 16", bytes);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(where, "cp.async from %p, which is no multiple of 16 bytes", global);
  }
  shared.begin_copy(target, where);
  copies_.push_back({target, global, bytes, committed_, where});
}

void AsyncCopies::wait(int pending, const Where& where) {
  for (; first_ < copies_.size() && copies_[first_].group < committed_ - pending; ++first_) {
    const Copy& copy = copies_[first_];
    unsigned char data[16] = {};
    if (copy.bytes > 0) memcpy(data, copy.global, static_cast<size_t>(copy.bytes));
    shared.end_copy(copy.shared, data, where);
  }
  if (first_ == copies_.size()) {
    copies_.clear();
    first_ = 0;
  }
}

void AsyncCopies::end_thread() {
  if (first_ < copies_.size()) {
    fail(copies_[first_].where,
         "the thread ends with %zu copies not waited for, this one the first",
         copies_.size() - first_);
  }
  clear();
}

void AsyncCopies::clear() {
  copies_.clear();
  first_ = 0;
  committed_ = 0;
}

}  // namespace fastattn::emulator
