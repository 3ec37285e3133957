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

  // Its addresses of 32 bits do not start at 0.
  uint32_t address_of(const void* pointer) const {
    return static_cast<uint32_t>(offset_of(pointer)) + kFirstAddress;
  }
  const void* pointer_to(uint32_t address) const {
    return arena_ + kGuardBytes + (int64_t{address} - kFirstAddress);
  }

 private:
  // Who: a thread, several threads of a warp, or threads of several warps; and when.
  struct Word {
    uint32_t write_time, read_time;
    uint16_t writer, reader;
  };
  // 16 bytes, of which no access crosses the bounds.
  struct Chunk {
    uint16_t copied_by;  // the thread whose copy is pending, from 1 on; 0: none
    bool words_differ;   // else its first word stands for all
  };
  struct Words {
    Word *first, *last;
    Word* begin() const {
      return first;
    }
    Word* end() const {
      return last;
    }
  };
  struct Access;

  size_t offset_of(const void* pointer) const {
    return static_cast<size_t>(static_cast<const unsigned char*>(pointer) - (arena_ + kGuardBytes));
  }
  // The words that an access touches, if it is allowed to be where it is.
  Words checked(const void* pointer, size_t size, const Access& access, const Where& where);
  void note_read(const void* pointer, size_t size, const Access& access, const Where& where);
  [[noreturn]] void fail_race(const Access& access, const Word& word, bool with_writer,
                              const Where& where);

  // NOTE: 128-byte aligned and not more, as kernels may assume.
  static constexpr uint32_t kFirstAddress = 1024 + 128;
  static constexpr size_t kGuardBytes = 1024 + 128, kChunkBytes = 16, kWordBytes = 2;
  static constexpr size_t kChunkWords = kChunkBytes / kWordBytes;
  alignas(1024) unsigned char arena_[kGuardBytes + kMaxSharedBytes + kGuardBytes];
  Word words_[kMaxSharedBytes / kWordBytes];
  Chunk chunks_[kMaxSharedBytes / kChunkBytes];
  size_t bytes_ = 0;
};

extern SharedMemory shared;

}  // namespace fastattn::emulator
