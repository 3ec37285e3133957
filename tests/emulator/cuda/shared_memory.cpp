#include "shared_memory.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <array>

#include "block.h"

namespace fastattn::emulator {

SharedMemory shared;

namespace {

constexpr unsigned char kNaNByte = 0xff, kGuardByte = 0xa5;

// Who has accessed a word, in 16 bits: the number of a thread, or kLanes + 32 warp, or kWarps.
constexpr uint16_t kLanesOfWarp = 0x8000, kWarps = 0xffff;

uint16_t warp_of(uint16_t who) {
  return (who & 0x7fff) / kLanes;
}

uint16_t lanes_of(uint16_t warp) {
  return static_cast<uint16_t>(kLanesOfWarp | warp * kLanes);
}

void describe(uint16_t who, char (&text)[48]) {
  if (who == kWarps) {
    snprintf(text, sizeof(text), "threads of several warps");
  } else if (who & kLanesOfWarp) {
    snprintf(text, sizeof(text), "several threads of warp %d", warp_of(who));
  } else {
    snprintf(text, sizeof(text), "thread %d", who);
  }
}

}  // namespace

// What orders an access after those before it.
struct SharedMemory::Access {
  const char* verb;
  size_t size;
  uint16_t who, warp;
  uint32_t now, block_time, warp_time;

  Access(const char* verb_, size_t size_, bool by_warp) : verb(verb_), size(size_) {
    const Thread& thread = block.current();
    warp = static_cast<uint16_t>(thread.warp->number);
    who = by_warp ? lanes_of(warp) : static_cast<uint16_t>(thread.number);
    now = block.now();
    block_time = block.block_time();
    warp_time = thread.warp->time;
  }

  bool comes_after(uint16_t other, uint32_t time) const {
    return time < block_time || (warp_of(other) == warp && (time < warp_time || other == who));
  }

  // Who has read a word that `other` has read before.
  uint16_t joined_with(uint16_t other, uint32_t time) const {
    if (comes_after(other, time)) return who;
    return warp_of(other) == warp ? lanes_of(warp) : kWarps;
  }
};

void SharedMemory::begin_block(size_t bytes) {
  bytes_ = bytes;
  unsigned char* const base = arena_ + kGuardBytes;
  memset(base, kNaNByte, bytes);
  memset(arena_, kGuardByte, kGuardBytes);
  memset(base + bytes, kGuardByte, kGuardBytes);
}

bool SharedMemory::is_guard_intact() const {
  static const auto intact = [] {
    std::array<unsigned char, kGuardBytes> guard;
    guard.fill(kGuardByte);
    return guard;
  }();
  return memcmp(arena_, intact.data(), kGuardBytes) == 0 &&
         memcmp(arena_ + kGuardBytes + bytes_, intact.data(), kGuardBytes) == 0;
}

void SharedMemory::forget_all() {
  memset(words_, 0, sizeof(words_));
  memset(chunks_, 0, sizeof(chunks_));
}

SharedMemory::Words SharedMemory::checked(const void* pointer, size_t size, const Access& access,
                                          const Where& where) {
  const size_t offset = offset_of(pointer);
  if (offset >= bytes_ || bytes_ - offset < size) [[unlikely]] {
    fail(where, "%s %zu bytes out of bounds, at offset %td of %zu bytes of shared memory",
         access.verb, size, static_cast<ptrdiff_t>(offset), bytes_);
  }
  if (offset % size != 0) [[unlikely]] {
    fail(where, "%s %zu bytes misaligned, at offset %zu of shared memory", access.verb, size,
         offset);
  }
  Chunk& chunk = chunks_[offset / kChunkBytes];
  if (chunk.copied_by != 0) [[unlikely]] {
    fail(
        where,
        "%s %zu bytes at offset %zu of shared memory, which a pending copy of thread %d is to fill",
        access.verb, size, offset, chunk.copied_by - 1);
  }
  Word* const words = words_ + offset / kChunkBytes * kChunkWords;
  if (!chunk.words_differ) {
    if (size == kChunkBytes) return {words, words + 1};
    std::fill(words + 1, words + kChunkWords, words[0]);
    chunk.words_differ = true;
  }
  Word* const first = words + offset % kChunkBytes / kWordBytes;
  return {first, first + std::max<size_t>(size / kWordBytes, 1)};
}

void SharedMemory::note_read(const void* pointer, size_t size, const Access& access,
                             const Where& where) {
  for (Word& word : checked(pointer, size, access, where)) {
    if (!access.comes_after(word.writer, word.write_time)) [[unlikely]] {
      fail_race(access, word, true, where);
    }
    word.reader = access.joined_with(word.reader, word.read_time);
    word.read_time = access.now;
  }
}

void SharedMemory::read(const void* pointer, size_t size, const Where& where) {
  note_read(pointer, size, Access("reads", size, false), where);
}

void SharedMemory::read_by_warp(const void* pointer, size_t size, const Where& where) {
  note_read(pointer, size, Access("reads", size, true), where);
}

void SharedMemory::write(const void* pointer, size_t size, const Where& where) {
  const Access access("writes", size, false);
  for (Word& word : checked(pointer, size, access, where)) {
    if (!access.comes_after(word.writer, word.write_time)) [[unlikely]] {
      fail_race(access, word, true, where);
    }
    if (!access.comes_after(word.reader, word.read_time)) [[unlikely]] {
      fail_race(access, word, false, where);
    }
    // Whatever comes after this write comes after what was read before it.
    word = {access.now, access.now, access.who, access.who};
  }
  if (size == kChunkBytes) chunks_[offset_of(pointer) / kChunkBytes].words_differ = false;
}

void SharedMemory::begin_copy(void* pointer, const Where& where) {
  write(pointer, kChunkBytes, where);
  memset(pointer, kNaNByte, kChunkBytes);
  chunks_[offset_of(pointer) / kChunkBytes].copied_by =
      static_cast<uint16_t>(block.current().number + 1);
}

void SharedMemory::end_copy(void* pointer, const void* data, const Where& where) {
  chunks_[offset_of(pointer) / kChunkBytes].copied_by = 0;
  write(pointer, kChunkBytes, where);
  memcpy(pointer, data, kChunkBytes);
}

void SharedMemory::fail_race(const Access& access, const Word& word, bool with_writer,
                             const Where& where) {
  char other[48];
  describe(with_writer ? word.writer : word.reader, other);
  fail(where, "race: %s %zu bytes at offset %zu of shared memory after a %s by %s, unordered",
       access.verb, access.size, static_cast<size_t>(&word - words_) * kWordBytes,
       with_writer ? "write" : "read", other);
}

}  // namespace fastattn::emulator
