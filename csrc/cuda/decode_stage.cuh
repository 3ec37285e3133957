// Tiles of keys or values on their way to a warp of the decode kernel: where the rows are, how they
// come, and what becomes of those of int8.
#pragma once

#include "forward_tile.cuh"

namespace fastattn::cuda {

// The key that a lane looks after, in the tile that is loaded next, wherever it is kept.
struct KeyCursor {
  const CacheView& cache;
  const Sequence& seq;
  int key;             // from the first tile on
  Columns seen;        // of these, those that may be looked for
  int page;            // of the sequence
  int64_t entry, row;  // of the tensors

  FA_DEVICE KeyCursor(const AttentionParams& p, const Sequence& s, int64_t first_tile, int nth)
      : cache(p.cache),
        seq(s),
        key(nth),
        seen(columns_of({s.first_seen, s.len_k}, first_tile, INT32_MAX)),
        page(0),
        row(s.first_k + first_tile + nth) {
    const auto most = static_cast<uint32_t>(rows_of_entry(cache)),
               kept = static_cast<uint32_t>(row);
    if (most > 0) {
      page = static_cast<int>(kept / most);
      row = kept % most;
    }
    find_entry();
  }

  // NOTE: what it reads of the block table is not needed before the next load: the table's latency
  // passes under a product.
  FA_DEVICE void advance(int keys) {
    key += keys;
    row += keys;
    const int64_t most = rows_of_entry(cache);
    if (most > 0) {
      for (; row >= most; row -= most) ++page;
    }
    find_entry();
  }

  // Row of a tensor that begins at `base`, or null.
  template <typename C>
  FA_DEVICE const C* in(const C* base, const int64_t (&stride)[5]) const {
    return is_seen() ? base + entry * stride[0] + row * stride[3] : nullptr;
  }

 private:
  FA_DEVICE bool is_seen() const {
    return seen.first <= key && key < seen.last;
  }

  FA_DEVICE void find_entry() {
    entry = seq.b0;
    if (cache.page_rows > 0 && is_seen()) entry = cache_page(cache, seq, page);
  }
};

// Rows of an int8 cache as they are: chunk by chunk, each of interest to the lane alone that has
// loaded it.
template <int kRowCount, int kColumnCount>
struct RawTile {
  using Element = int8_t;
  static constexpr int kRows = kRowCount, kColumns = kColumnCount, kChunkColumns = 16;
  static constexpr int kRowChunks = kColumns / kChunkColumns;

  Chunk data[kRows * kRowChunks];

  FA_DEVICE const Chunk* chunk(int row, int index) const {
    return data + row * kRowChunks + index;
  }
  static FA_DEVICE uint32_t step(uint32_t from, int rows, int chunks) {
    return from + static_cast<uint32_t>((rows * kRowChunks + chunks) * 16);
  }
};

// 16 numbers of int8, as numbers of T.
template <typename T>
struct WidenedChunk {
  static constexpr int kChunks = sizeof(T);
  Chunk chunk[kChunks];

  FA_DEVICE explicit WidenedChunk(const Chunk& raw) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = static_cast<int8_t>(raw.word[w] >> 8 * c);
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int c = 0; c < 4; ++c) chunk[w].word[c] = __float_as_uint(x[c]);
      } else {
        chunk[w / 2].word[w % 2 * 2] = ptx::pack(x[0], x[1], T{});
        chunk[w / 2].word[w % 2 * 2 + 1] = ptx::pack(x[2], x[3], T{});
      }
    }
  }
};

// A lane's chunks of a tile in shared memory: each 32nd one. C: what the rows are stored as.
template <typename Stage, typename C>
struct LaneChunks {
  static constexpr int kCount = Stage::kRows * Stage::kRowChunks / ptx::kWarpSize;
  static_assert(kCount * ptx::kWarpSize == Stage::kRows * Stage::kRowChunks);

  int lane;

  // Every lane knows where one row is (nullptr: what is there is zero), and copies chunks of all of
  // them. kFirst: nothing has been in this stage; else what lies beyond the columns is zero.
  // `somewhere`: any address.
  template <bool kFirst>
  FA_DEVICE void load(Stage& stage, const C* own_row, const C* somewhere,
                      const ColumnLayout& layout) const {
    const bool has_rest =
        layout.columns % Stage::kChunkColumns != 0 || (kFirst && layout.columns < Stage::kColumns);
    const auto own = reinterpret_cast<uint64_t>(own_row);
    if (!layout.is_chunked) {
      gather(stage, own, layout);
    } else if (has_rest || ptx::any_in_warp(own_row == nullptr)) {
      copy_some(stage, own, somewhere, layout.columns);
    } else {
      copy_whole(stage, own, layout.columns);
    }
  }

  FA_DEVICE bool hold_nonfinite(const Stage& stage) const {
    bool found = false;
#pragma unroll
    for (int nth = 0; nth < kCount; ++nth) {
      const Chunk chunk = ptx::load_shared<Chunk>(address_of<1>(stage, nth));
#pragma unroll
      for (int w = 0; w < 4; ++w) found |= is_nonfinite(chunk.word[w], C{});
    }
    return found;
  }

  // int8 becomes T.
  template <typename Tile>
  FA_DEVICE void widen(const Stage& stage, Tile& tile) const {
    using Wide = WidenedChunk<typename Tile::Element>;
#pragma unroll
    for (int nth = 0; nth < kCount; ++nth) {
      const Wide wide(ptx::load_shared<Chunk>(address_of<1>(stage, nth)));
      const uint32_t to = address_of<Wide::kChunks>(tile, nth);
#pragma unroll
      for (int c = 0; c < Wide::kChunks; ++c) {
        ptx::store_shared(Tile::step(to, 0, c), wide.chunk[c]);
      }
    }
  }

 private:
  struct Place {
    int row, index;
  };
  FA_DEVICE Place place_of(int nth) const {
    const int n = nth * ptx::kWarpSize + lane;
    return {n / Stage::kRowChunks, n % Stage::kRowChunks};
  }

  // Where the nth chunk is, or what it becomes in a tile with kWidth chunks for one of a stage. A
  // lane that stays in its column of chunks goes down by a power of two rows at a time.
  template <int kWidth, typename Tile>
  FA_DEVICE uint32_t address_of(const Tile& tile, int nth) const {
    constexpr bool kStays = ptx::kWarpSize % Stage::kRowChunks == 0;
    const Place at = place_of(kStays ? 0 : nth);
    const uint32_t address = ptx::shared_address(tile.chunk(at.row, at.index * kWidth));
    return kStays ? Tile::step(address, nth * (ptx::kWarpSize / Stage::kRowChunks), 0) : address;
  }

  FA_DEVICE void copy_whole(Stage& stage, uint64_t own, int columns) const {
    const int chunks = columns / Stage::kChunkColumns;
#pragma unroll 8
    for (int nth = 0; nth < kCount; ++nth) {
      const Place at = place_of(nth);
      const auto* row = reinterpret_cast<const Chunk*>(ptx::shuffle(own, at.row));
      if (at.index < chunks) ptx::cp_async_16(address_of<1>(stage, nth), row + at.index, 16);
    }
  }

  FA_DEVICE void copy_some(Stage& stage, uint64_t own, const C* somewhere, int columns) const {
#pragma unroll 1
    for (int nth = 0; nth < kCount; ++nth) {
      const Place at = place_of(nth);
      const C* row = reinterpret_cast<const C*>(ptx::shuffle(own, at.row));
      const int first = at.index * Stage::kChunkColumns;
      const int there = row == nullptr ? 0 : clamp_columns<Stage>(columns - first);
      // Where nothing is read, the address must still be one.
      ptx::cp_async_16(address_of<1>(stage, nth), there > 0 ? row + first : somewhere,
                       there * static_cast<int>(sizeof(C)));
    }
  }

  FA_DEVICE void gather(Stage& stage, uint64_t own, const ColumnLayout& layout) const {
#pragma unroll 1
    for (int nth = 0; nth < kCount; ++nth) {
      const Place at = place_of(nth);
      const C* row = reinterpret_cast<const C*>(ptx::shuffle(own, at.row));
      const int first = at.index * Stage::kChunkColumns;
      Chunk chunk = {};
      if (row != nullptr) chunk = gather_chunk<C>(row, layout.stride, first, layout.columns);
      ptx::store_shared(address_of<1>(stage, nth), chunk);
    }
  }
};

}  // namespace fastattn::cuda
