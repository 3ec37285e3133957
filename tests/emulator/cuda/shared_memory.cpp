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

// Who has accessed a word, in 16 bits: an actor, or kLanesOfWarp + 32 warp, or kWarps; kSet: the
// readers are in a set.
constexpr uint16_t kLanesOfWarp = 0x8000, kWarps = 0xffff, kSet = 0xfffe;

bool is_lanes(uint16_t who) {
  return (who & kLanesOfWarp) != 0 && who < kSet;
}

uint16_t warp_of(uint16_t who) {
  return (who & 0x7fff) / kLanes;
}

uint16_t lanes_of(uint16_t warp) {
  return static_cast<uint16_t>(kLanesOfWarp | warp * kLanes);
}

// Which halves of a chunk an access touches.
uint8_t halves_of(size_t offset, size_t size) {
  return size == 16 ? 3 : offset % 16 < 8 ? 1 : 2;
}

void describe(uint16_t who, char (&text)[48]) {
  if (who == kWarps) {
    snprintf(text, sizeof(text), "threads of several warps");
  } else if (is_lanes(who)) {
    snprintf(text, sizeof(text), "several threads of warp %d", warp_of(who));
  } else if (who >= kFirstBarrier) {
    snprintf(text, sizeof(text), "a copy for barrier %d", who - kFirstBarrier);
  } else if (who >= kFirstGroup) {
    snprintf(text, sizeof(text), "a product of warpgroup %d", who - kFirstGroup);
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
  uint32_t now, settled, warp_time;
  const Knowledge* known;  // beyond that; null: nothing

  // By the current thread.
  Access(const char* verb_, size_t size_, bool by_warp) : verb(verb_), size(size_) {
    const Thread& thread = block.current();
    warp = static_cast<uint16_t>(thread.warp->number);
    who = by_warp ? lanes_of(warp) : static_cast<uint16_t>(thread.number);
    now = block.now();
    settled = block.settled_time();
    warp_time = thread.warp->time;
    known = block.has_order() ? &thread.beyond->known : nullptr;
  }

  // A read by what is no thread, on behalf of several.
  Access(Actor actor, const Knowledge& common)
      : verb("reads"),
        size(kChunkBytes),
        who(actor),
        warp(warp_of(kWarps)),
        now(block.now()),
        settled(block.settled_time()),
        warp_time(0),
        known(&common) {}

  bool comes_after(uint16_t other, uint32_t time) const {
    return time < settled || (warp_of(other) == warp && (time < warp_time || other == who)) ||
           (known != nullptr && is_known(other, time));
  }

  bool is_known(uint16_t other, uint32_t time) const {
    if (!(other & kLanesOfWarp)) return known->has(other, time);
    if (!is_lanes(other)) return false;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!known->has(static_cast<Actor>(warp_of(other) * kLanes + lane), time)) return false;
    }
    return true;
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
  for (const size_t chunk : barriers_) chunks_[chunk].barriers = 0;
  barriers_.clear();
  drop_all_readers();
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
  drop_all_readers();
  memset(words_, 0, sizeof(words_));
  memset(chunks_, 0, sizeof(chunks_));
}

// ---- Where an access may be ---------------------------------------------------------------------

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
  if (chunk.copied_by != 0 || (chunk.barriers & halves_of(offset, size)) != 0) [[unlikely]] {
    fail_pending(chunk, offset, access, where);
  }
  Word* const words = words_ + offset / kChunkBytes * kChunkWords;
  if (!chunk.words_differ) {
    if (size == kChunkBytes) return {words, words + 1};
    split(chunk, words);
  }
  Word* const first = words + offset % kChunkBytes / kWordBytes;
  return {first, first + std::max<size_t>(size / kWordBytes, 1)};
}

SharedMemory::Words SharedMemory::words_of_chunk(const void* chunk) {
  Word* const words = words_ + offset_of(chunk) / kWordBytes;
  return {words, words + (chunk_of(chunk).words_differ ? kChunkWords : 1)};
}

void SharedMemory::split(Chunk& chunk, Word* words) {
  std::fill(words + 1, words + kChunkWords, words[0]);
  chunk.words_differ = true;
  if (words[0].reader != kSet) return;
  for (Word* word = words + 1; word < words + kChunkWords; ++word) {
    word->reader = kWarps;  // not to free the set of the first
    word->read_time = 0;
    for (size_t i = 0; i < reader_sets_[words[0].read_time].readers.size(); ++i) {
      const Reader reader = reader_sets_[words[0].read_time].readers[i];
      if (i == 0) {
        word->reader = reader.who;
        word->read_time = reader.time;
      } else {
        join_readers(*word, reader);
      }
    }
  }
}

void SharedMemory::fail_pending(const Chunk& chunk, size_t offset, const Access& access,
                                const Where& where) {
  if ((chunk.barriers & halves_of(offset, access.size)) != 0) {
    fail(where, "%s %zu bytes at offset %zu of shared memory, where an mbarrier is", access.verb,
         access.size, offset);
  }
  if (chunk.copied_by != 0) {
    fail(
        where,
        "%s %zu bytes at offset %zu of shared memory, which a pending copy of thread %d is to fill",
        access.verb, access.size, offset, chunk.copied_by - 1);
  }
  fail(where,
       "%s %zu bytes at offset %zu of shared memory, which a pending copy or product is to read",
       access.verb, access.size, offset);
}

void SharedMemory::fail_race(const Access& access, const Word& word, const char* what, uint16_t who,
                             const Where& where) {
  char other[48];
  describe(who, other);
  fail(where, "race: %s %zu bytes at offset %zu of shared memory after a %s by %s, unordered",
       access.verb, access.size, static_cast<size_t>(&word - words_) * kWordBytes, what, other);
}

// ---- Readers ------------------------------------------------------------------------------------

// Beside those that have read the word since it was written.
void SharedMemory::join_readers(Word& word, Reader reader) {
  const bool is_unread = word.reader == word.writer && word.read_time == word.write_time;
  if (is_unread || word.reader == reader.who) {
    word.reader = reader.who;
    word.read_time = reader.time;
    return;
  }
  if (word.reader != kSet) {
    const Reader first = {word.reader, word.read_time};
    if (free_sets_.empty()) {
      free_sets_.push_back(static_cast<uint32_t>(reader_sets_.size()));
      reader_sets_.emplace_back();
    }
    word.reader = kSet;
    word.read_time = free_sets_.back();
    free_sets_.pop_back();
    reader_sets_[word.read_time].word = &word;
    reader_sets_[word.read_time].readers.assign(1, first);
  }
  std::vector<Reader>& readers = reader_sets_[word.read_time].readers;
  const auto own = std::find_if(readers.begin(), readers.end(),
                                [&](const Reader& other) { return other.who == reader.who; });
  if (own == readers.end()) {
    readers.push_back(reader);
  } else {
    own->time = reader.time;
  }
}

void SharedMemory::add_reader(Word& word, const Access& access) {
  if (access.known == nullptr) {
    word.reader = access.joined_with(word.reader, word.read_time);
    word.read_time = access.now;
    return;
  }
  if (word.reader == kSet) {
    std::erase_if(reader_sets_[word.read_time].readers,
                  [&](const Reader& other) { return access.comes_after(other.who, other.time); });
    if (!reader_sets_[word.read_time].readers.empty()) {
      return join_readers(word, {access.who, access.now});
    }
    drop_readers(word);
  } else if (!access.comes_after(word.reader, word.read_time)) {
    return join_readers(word, {access.who, access.now});
  }
  word.reader = access.who;
  word.read_time = access.now;
}

// The word is about to have other ones.
void SharedMemory::drop_readers(Word& word) {
  if (word.reader != kSet) return;
  reader_sets_[word.read_time].word = nullptr;
  free_sets_.push_back(word.read_time);
  word.reader = kWarps;
  word.read_time = 0;
}

void SharedMemory::drop_all_readers() {
  for (const ReaderSet& set : reader_sets_) {
    if (set.word != nullptr) drop_readers(*set.word);
  }
}

const SharedMemory::Reader* SharedMemory::unordered_reader(const Word& word, const Access& access,
                                                           Reader* single) {
  if (word.reader != kSet) {
    *single = {word.reader, word.read_time};
    return access.comes_after(word.reader, word.read_time) ? nullptr : single;
  }
  for (const Reader& reader : reader_sets_[word.read_time].readers) {
    if (!access.comes_after(reader.who, reader.time)) return &reader;
  }
  return nullptr;
}

// ---- Accesses by threads ------------------------------------------------------------------------

void SharedMemory::note_read(const void* pointer, size_t size, const Access& access,
                             const Where& where) {
  for (Word& word : checked(pointer, size, access, where)) {
    if (!access.comes_after(word.writer, word.write_time)) [[unlikely]] {
      fail_race(access, word, "write", word.writer, where);
    }
    add_reader(word, access);
  }
}

void SharedMemory::note_write(const void* pointer, size_t size, const Access& access,
                              const Where& where) {
  const Words words = checked(pointer, size, access, where);
  const uint32_t fences = block.fences_of_current();
  Chunk& chunk = chunk_of(pointer);
  if (chunk.async_reads != 0) [[unlikely]]
    fail_pending(chunk, offset_of(pointer), access, where);
  for (Word& word : words) {
    if (!access.comes_after(word.writer, word.write_time)) [[unlikely]] {
      fail_race(access, word, "write", word.writer, where);
    }
    Reader single;
    if (const Reader* reader = unordered_reader(word, access, &single)) [[unlikely]] {
      fail_race(access, word, "read", reader->who, where);
    }
    drop_readers(word);
    // Whatever comes after this write comes after what was read before it.
    word = {access.now, access.now, access.who, access.who, fences};
  }
  if (size == kChunkBytes) chunk.words_differ = false;
}

void SharedMemory::read(const void* pointer, size_t size, const Where& where) {
  note_read(pointer, size, Access("reads", size, false), where);
}

void SharedMemory::read_by_warp(const void* pointer, size_t size, const Where& where) {
  note_read(pointer, size, Access("reads", size, true), where);
}

void SharedMemory::write(const void* pointer, size_t size, const Where& where) {
  note_write(pointer, size, Access("writes", size, false), where);
}

void SharedMemory::begin_copy(void* pointer, const Where& where) {
  write(pointer, kChunkBytes, where);
  memset(pointer, kNaNByte, kChunkBytes);
  chunk_of(pointer).copied_by = static_cast<uint16_t>(block.current().number + 1);
}

void SharedMemory::end_copy(void* pointer, const void* data, const Where& where) {
  chunk_of(pointer).copied_by = 0;
  write(pointer, kChunkBytes, where);
  memcpy(pointer, data, kChunkBytes);
}

void SharedMemory::make_barrier(void* pointer, const Where& where) {
  write(pointer, 8, where);
  chunk_of(pointer).barriers |= halves_of(offset_of(pointer), 8);
  barriers_.push_back(offset_of(pointer) / kChunkBytes);
}

// ---- Accesses by TMA and wgmma ------------------------------------------------------------------

// The thread that stored the word has called fence_async_proxy since, before the access.
void SharedMemory::require_fenced(const Word& word, const Access& access, const Where& where) {
  if (word.writer >= kMaxThreads || word.write_time < block.first_time()) return;
  const auto& fences = block.thread(word.writer).beyond->fences;
  if (word.fences < fences.size() && access.comes_after(word.writer, fences[word.fences])) return;
  fail(where,
       "%s asynchronously %zu bytes at offset %zu of shared memory, which thread %d has stored "
       "without a fence_async_proxy of its own before the access",
       access.verb, access.size, static_cast<size_t>(&word - words_) * kWordBytes, word.writer);
}

void SharedMemory::begin_async_write(void* chunk, const Where& where) {
  const Access access("writes", kChunkBytes, false);
  for (const Word& word : checked(chunk, kChunkBytes, access, where)) {
    require_fenced(word, access, where);
  }
  note_write(chunk, kChunkBytes, access, where);
  memset(chunk, kNaNByte, kChunkBytes);
  chunk_of(chunk).copied_by = static_cast<uint16_t>(block.current().number + 1);
}

void SharedMemory::end_async_write(void* chunk, const void* data, Actor actor) {
  chunk_of(chunk).copied_by = 0;
  for (Word& word : words_of_chunk(chunk)) {
    drop_readers(word);
    word = {block.now(), block.now(), actor, actor, 0};
  }
  memcpy(chunk, data, kChunkBytes);
}

void SharedMemory::begin_async_read(const void* chunk, const Access& access, const Where& where) {
  for (const Word& word : checked(chunk, kChunkBytes, access, where)) {
    if (!access.comes_after(word.writer, word.write_time)) [[unlikely]] {
      fail_race(access, word, "write", word.writer, where);
    }
    require_fenced(word, access, where);
  }
  ++chunk_of(chunk).async_reads;
}

void SharedMemory::begin_async_read(const void* chunk, const Where& where) {
  begin_async_read(chunk, Access("reads", kChunkBytes, false), where);
}

void SharedMemory::begin_async_read(const void* chunk, Actor group, const Knowledge& common,
                                    const Where& where) {
  begin_async_read(chunk, Access(group, common), where);
}

void SharedMemory::end_async_read(const void* chunk, Actor actor) {
  --chunk_of(chunk).async_reads;
  for (Word& word : words_of_chunk(chunk)) join_readers(word, {actor, block.now()});
}

}  // namespace fastattn::emulator
