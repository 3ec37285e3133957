// The shared memory of the block that runs, and what is known about each of its words: who wrote it
// last, who has read it since, and which copy is on its way to it.
//
// Two accesses by different threads, one of them a write, must be ordered by a barrier of the
// block, or by sync_warp if they are of one warp. Nothing else orders them, shuffles included.
// Stores of single bytes are not known: words have two.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "failure.h"

namespace fastattn::emulator {

constexpr size_t kMaxSharedBytes = 163 << 10;  // that a block can ask for

class SharedMemory {
 public:
  // All of it becomes NaN.
  void begin_block(size_t bytes);
  // Whether nobody wrote beside it.
  bool is_guard_intact() const;
  // After a launch that failed; and before the clock starts again.
  void forget_all();

  void* data() {
    return arena_ + kGuardBytes;
  }

  // Each is called before the access, by the thread that makes it.
  void read(const void* pointer, size_t size, const Where& where);
  void write(const void* pointer, size_t size, const Where& where);
  // A read for the whole warp: what any lane wrote must have been ordered.
  void read_by_warp(const void* pointer, size_t size, const Where& where);

  // 16 bytes are NaN and nobody's until the copy has ended.
  void begin_copy(void* pointer, const Where& where);
  void end_copy(void* pointer, const void* data, const Where& where);

  // Where a pointer into it points.
  size_t offset_of(const void* pointer) const;

 private:
  // Who: a thread, several threads of a warp, or threads of several warps; and when.
  struct Word {
    uint32_t write_time, read_time;
    uint16_t writer, reader;
  };
  struct Access;

  // The first word that an access touches, if it is allowed to be where it is.
  Word* checked(const void* pointer, size_t size, const Access& access, const Where& where);
  void note_read(const void* pointer, size_t size, const Access& access, const Where& where);
  [[noreturn]] void fail_race(const Access& access, const Word& word, bool with_writer,
                              const Where& where);

  // NOTE: 128-byte aligned and not more, as kernels may assume.
  static constexpr size_t kGuardBytes = 4096 + 128, kCopyBytes = 16, kWordBytes = 2;
  alignas(1024) unsigned char arena_[kGuardBytes + kMaxSharedBytes + kGuardBytes];
  Word words_[kMaxSharedBytes / kWordBytes];
  uint16_t copying_[kMaxSharedBytes / kCopyBytes];  // by which thread, from 1 on; 0: none
  size_t bytes_ = 0;
};

extern SharedMemory shared;

}  // namespace fastattn::emulator
