// The shared memory of the block that runs, and what is known about each of its words: who wrote it
// last, who has read it since, and which copy is on its way to it.
//
// Two accesses by different threads, one of them a write, must be ordered by a barrier of the
// block, by sync_warp if they are of one warp, or by mbarriers and named barriers (order.h).
// Nothing else orders them, shuffles included. What TMA and wgmma access, they access until
// somebody has waited for it. Stores of single bytes are not known: words have two.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "failure.h"
#include "order.h"

namespace fastattn::emulator {

constexpr size_t kMaxSharedBytes = 227 << 10;  // that a block can ask for on any device

// Where a 16-byte chunk of a panel with the swizzle of 128 bytes lies.
inline uint32_t swizzled_128(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

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

  // Those of TMA and wgmma, of 16 bytes each. Between begin and end the chunk belongs to them. What
  // threads have stored before must have been fenced by them. A copy is begun by the current
  // thread, a product by all that its warpgroup has in common.
  void begin_async_write(void* chunk, const Where& where);
  void end_async_write(void* chunk, const void* data, Actor actor);
  void begin_async_read(const void* chunk, const Where& where);
  void begin_async_read(const void* chunk, Actor group, const Knowledge& common,
                        const Where& where);
  void end_async_read(const void* chunk, Actor actor);

  // 8 bytes become a barrier, which no access touches any more.
  void make_barrier(void* pointer, const Where& where);

  // Its addresses of 32 bits do not start at 0.
  uint32_t address_of(const void* pointer) const {
    return static_cast<uint32_t>(offset_of(pointer)) + kFirstAddress;
  }
  const void* pointer_to(uint32_t address) const {
    return arena_ + kGuardBytes + (int64_t{address} - kFirstAddress);
  }

 private:
  // Who: an actor, several threads of a warp, or threads of several warps; and when. Of several
  // readers whose order matters one by one, read_time is the number of a set.
  struct Word {
    uint32_t write_time, read_time;
    uint16_t writer, reader;
    uint32_t fences;  // of the writer, before it wrote
  };
  // 16 bytes, of which no access crosses the bounds.
  struct Chunk {
    uint16_t copied_by;    // the thread whose copy is pending, from 1 on; 0: none
    uint16_t async_reads;  // that are pending
    bool words_differ;     // else its first word stands for all
    uint8_t barriers;      // bit k: its 8 bytes from 8 k on are one
  };
  struct Reader {
    uint16_t who;
    uint32_t time;
  };
  struct ReaderSet {
    Word* word;  // whose readers they are; null: nobody's
    std::vector<Reader> readers;
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
  Chunk& chunk_of(const void* pointer) {
    return chunks_[offset_of(pointer) / kChunkBytes];
  }
  // The words that an access touches, if it is allowed to be where it is.
  Words checked(const void* pointer, size_t size, const Access& access, const Where& where);
  Words words_of_chunk(const void* chunk);
  void split(Chunk& chunk, Word* words);
  void note_read(const void* pointer, size_t size, const Access& access, const Where& where);
  void note_write(const void* pointer, size_t size, const Access& access, const Where& where);
  void begin_async_read(const void* chunk, const Access& access, const Where& where);
  void require_fenced(const Word& word, const Access& access, const Where& where);

  void add_reader(Word& word, const Access& access);
  void join_readers(Word& word, Reader reader);
  void drop_readers(Word& word);
  void drop_all_readers();
  // One of them that the access does not come after.
  const Reader* unordered_reader(const Word& word, const Access& access, Reader* single);

  [[noreturn]] void fail_pending(const Chunk& chunk, size_t offset, const Access& access,
                                 const Where& where);
  [[noreturn]] void fail_race(const Access& access, const Word& word, const char* what,
                              uint16_t who, const Where& where);

  // NOTE: 128-byte aligned and not more, as kernels may assume.
  static constexpr uint32_t kFirstAddress = 1024 + 128;
  static constexpr size_t kGuardBytes = 1024 + 128, kChunkBytes = 16, kWordBytes = 2;
  static constexpr size_t kChunkWords = kChunkBytes / kWordBytes;
  alignas(1024) unsigned char arena_[kGuardBytes + kMaxSharedBytes + kGuardBytes];
  Word words_[kMaxSharedBytes / kWordBytes];
  Chunk chunks_[kMaxSharedBytes / kChunkBytes];
  std::vector<ReaderSet> reader_sets_;
  std::vector<uint32_t> free_sets_;
  std::vector<size_t> barriers_;  // chunks
  size_t bytes_ = 0;
};

extern SharedMemory shared;

}  // namespace fastattn::emulator
