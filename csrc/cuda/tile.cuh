// Tiles of rows in shared memory, and how they get there from tensors of any strides.
#pragma once

#include <type_traits>

#include "chunk.cuh"
#include "fastattn/sequence.h"
#include "forward_params.h"

namespace fastattn::cuda {

// kRows x kColumns elements. A row is cut into panels of 128 bytes (64, where 128 do not fit), all
// rows of a panel lie together, and the 16-byte chunks of a row are permuted by its number, so that
// neither a column of chunks nor a row of them meets a bank twice.
template <typename T, int kRowCount, int kColumnCount>
struct SharedTile {
  using Element = T;
  static constexpr int kRows = kRowCount, kColumns = kColumnCount;
  static constexpr int kChunkColumns = 16 / sizeof(T);
  static constexpr int kRowChunks = kColumns / kChunkColumns;
  static constexpr int kPanelChunks = kRowChunks % 8 == 0 ? 8 : 4;
  static_assert(kRowChunks % kPanelChunks == 0);

  alignas(128) T data[kRows * kColumns];

  static FA_DEVICE int permutation(int row) {
    return kPanelChunks == 8 ? row & 7 : row >> 1 & 3;
  }
  FA_DEVICE const T* chunk(int row, int index) const {
    const int panel = index / kPanelChunks, within = index % kPanelChunks;
    const int permuted = within ^ permutation(row);
    return data + ((panel * kRows + row) * kPanelChunks + permuted) * kChunkColumns;
  }
  FA_DEVICE T* chunk(int row, int index) {
    return const_cast<T*>(static_cast<const SharedTile*>(this)->chunk(row, index));
  }
  // From the address of a chunk to that of the one so many rows and chunks after it. The first has
  // index 0 or 1 and `chunks` is even; `rows`, or the first one's row, is a multiple of 8. With
  // both steps known to the compiler this is one exclusive or.
  static FA_DEVICE uint32_t step(uint32_t from, int rows, int chunks) {
    const int panel = chunks / kPanelChunks, within = chunks % kPanelChunks;
    return (from ^ static_cast<uint32_t>(16 * (within ^ permutation(rows)))) +
           static_cast<uint32_t>((panel * kRows + rows) * kPanelChunks * 16);
  }
  FA_DEVICE const T* at(int row, int column) const {
    return chunk(row, column / kChunkColumns) + column % kChunkColumns;
  }
  FA_DEVICE T* at(int row, int column) {
    return const_cast<T*>(static_cast<const SharedTile*>(this)->at(row, column));
  }
};

// How threads share the chunks of a tile: each has one column of chunks in every panel, and every
// kRows-th row.
template <int kThreads, typename Tile>
struct ChunkShare {
  static constexpr int kPanels = Tile::kRowChunks / Tile::kPanelChunks;
  static constexpr int kRows = kThreads / Tile::kPanelChunks, kPasses = Tile::kRows / kRows;
  static_assert(kPasses * kRows == Tile::kRows);
};

// Calls body(row, chunk) for this thread's share.
template <int kThreads, typename Tile, typename Body>
FA_DEVICE void for_each_chunk(int thread, const Body& body) {
  using Share = ChunkShare<kThreads, Tile>;
  const int row = thread / Tile::kPanelChunks, index = thread % Tile::kPanelChunks;
#pragma unroll 1
  for (int n = 0; n < Share::kPasses * Share::kPanels; ++n) {
    body(row + n / Share::kPanels * Share::kRows, index + n % Share::kPanels * Tile::kPanelChunks);
  }
}

// Of the columns of a chunk, those that are there.
template <typename Tile>
FA_DEVICE int clamp_columns(int columns) {
  return max_of(min_of(columns, Tile::kChunkColumns), 0);
}

// Rows at equal distances in memory, of which those from `begin` to `end` are there.
template <typename C>
struct EvenRows {
  const C* row0;
  int64_t stride;
  int begin, end;
};

// The loop that most of the time goes through: an addition and a comparison a row beside the
// copies.
template <int kThreads, typename Tile, typename C>
FA_DEVICE void copy_even_rows(Tile& tile, int thread, int columns, const EvenRows<C>& rows) {
  using Share = ChunkShare<kThreads, Tile>;
  static_assert(Share::kRows % 8 == 0, "every pass must find its chunks permuted alike");
  constexpr int kPanelColumns = Tile::kPanelChunks * Tile::kChunkColumns;
  const int row = thread / Tile::kPanelChunks, index = thread % Tile::kPanelChunks;
  const int first = index * Tile::kChunkColumns;
  const uint32_t to = ptx::shared_address(tile.chunk(row, index));
  const C* from = rows.row0 + row * rows.stride + first;
#pragma unroll
  for (int pass = 0; pass < Share::kPasses; ++pass) {
    const int r = row + pass * Share::kRows;
    const bool is_there = r >= rows.begin && r < rows.end;
#pragma unroll
    for (int panel = 0; panel < Share::kPanels; ++panel) {
      const int there = clamp_columns<Tile>(columns - first - panel * kPanelColumns);
      const int place = (panel * Tile::kRows + pass * Share::kRows) * Tile::kPanelChunks * 16;
      ptx::cp_async_16(to + static_cast<uint32_t>(place), from + panel * kPanelColumns,
                       is_there ? there * static_cast<int>(sizeof(C)) : 0);
    }
    from += Share::kRows * rows.stride;
  }
}

// Fills a tile: row r from rows(r), zeros where that is null. Copies asynchronously where it can;
// the caller commits, and waits.
template <int kThreads, typename Tile, typename TileRows>
FA_DEVICE void load_tile(Tile& tile, int thread, const ColumnLayout& layout, const TileRows& rows) {
  using T = typename Tile::Element;
  using C = typename TileRows::Element;
  if constexpr (sizeof(C) == sizeof(T)) {
    if (layout.is_chunked && rows.are_even()) {
      copy_even_rows<kThreads>(tile, thread, layout.columns, rows.even(Tile::kRows));
      return;
    }
  }
  for_each_chunk<kThreads, Tile>(thread, [&](int r, int index) {
    const C* row = rows(r);
    const int first = index * Tile::kChunkColumns;
    const int there = row == nullptr ? 0 : clamp_columns<Tile>(layout.columns - first);
    if constexpr (sizeof(C) == sizeof(T)) {
      if (layout.is_chunked) {
        // Where nothing is read, the address must still be one.
        ptx::cp_async_16(tile.chunk(r, index), there > 0 ? row + first : rows.any(),
                         there * static_cast<int>(sizeof(C)));
        return;
      }
    }
    Chunk chunk = {};
    if (there > 0) chunk = gather_chunk<T>(row, layout.stride, first, layout.columns);
    ptx::store_shared(reinterpret_cast<Chunk*>(tile.chunk(r, index)), chunk);
  });
}

// Whether a word of two 16-bit numbers, or of one float, holds infinity or NaN.
FA_DEVICE bool is_nonfinite(uint32_t word, float) {
  return (word & 0x7f800000u) == 0x7f800000u;
}
FA_DEVICE bool is_nonfinite(uint32_t word, bf16) {
  return (word & 0x7f80u) == 0x7f80u || (word & 0x7f800000u) == 0x7f800000u;
}
FA_DEVICE bool is_nonfinite(uint32_t word, f16) {
  return (word & 0x7c00u) == 0x7c00u || (word & 0x7c000000u) == 0x7c000000u;
}

// Whether this thread's share of a tile, which it has loaded itself, holds infinity or NaN.
template <int kThreads, typename Tile>
FA_DEVICE bool share_is_nonfinite(const Tile& tile, int thread) {
  bool found = false;
  for_each_chunk<kThreads, Tile>(thread, [&](int r, int index) {
    const Chunk chunk = ptx::load_shared(reinterpret_cast<const Chunk*>(tile.chunk(r, index)));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      found |= is_nonfinite(chunk.word[w], typename Tile::Element{});
    }
  });
  return found;
}

// Keys or values of one KV head, wherever they are kept. C: what they are stored as.
template <typename C>
struct KeyRows {
  const C* base;  // of key 0; in a paged cache or a ring of row 0 of entry 0
  int64_t row_stride, entry_stride;
  const CacheView* cache;
  const Sequence* seq;

  FA_DEVICE KeyRows(const AttentionParams& p, const ConstTensor& tensor, const Sequence& s,
                    int64_t head_kv)
      : base(static_cast<const C*>(tensor.data) + s.b1 * tensor.stride[1] +
             head_kv * tensor.stride[2]),
        row_stride(tensor.stride[3]),
        entry_stride(tensor.stride[0]),
        cache(&p.cache),
        seq(&s) {
    if (!has_row_table(*cache)) base += s.b0 * entry_stride + s.first_k * row_stride;
  }

  // Of key j of the sequence.
  FA_DEVICE const C* row(int64_t j) const {
    if (!has_row_table(*cache)) return base + j * row_stride;
    // As cache_run, in 32 bits: a division of 64 is a call that keeps everything else waiting.
    const uint32_t key = static_cast<uint32_t>(seq->first_k + j);
    if (cache->page_rows > 0) {
      const uint32_t page_rows = static_cast<uint32_t>(cache->page_rows), page = key / page_rows;
      const int64_t entry = cache_page(*cache, *seq, page);
      return base + entry * entry_stride + (key - page * page_rows) * row_stride;
    }
    return base + seq->b0 * entry_stride +
           key % static_cast<uint32_t>(cache->ring_rows) * row_stride;
  }
};

// Rows of a tile of keys: those from j0 on that lie in `keys`, which are all that may be looked
// for.
template <typename C>
struct KeyTileRows {
  using Element = C;
  const KeyRows<C>& rows;
  int64_t j0;
  Range keys;

  FA_DEVICE const C* operator()(int r) const {
    const int64_t j = j0 + r;
    return j >= keys.first && j < keys.last ? rows.row(j) : nullptr;
  }
  FA_DEVICE const C* any() const {
    return rows.base;
  }
  FA_DEVICE bool are_even() const {
    return !has_row_table(*rows.cache);
  }
  FA_DEVICE EvenRows<C> even(int count) const {
    return {rows.base + j0 * rows.row_stride, rows.row_stride,
            static_cast<int>(clamp_of(keys.first - j0, 0, count)),
            static_cast<int>(clamp_of(keys.last - j0, 0, count))};
  }
};

// A tile of query rows. With several heads of a group in one tile, row x of the tile space is query
// x / pack of head first_head + x % pack.
struct QueryTile {
  int64_t first_head, first;
  int pack;

  FA_DEVICE int64_t query(int r) const {
    return pack == 1 ? first + r : static_cast<uint32_t>(first + r) / static_cast<uint32_t>(pack);
  }
  FA_DEVICE int64_t head(int r) const {
    return pack == 1 ? first_head
                     : first_head + static_cast<uint32_t>(first + r) % static_cast<uint32_t>(pack);
  }
};

// Rows of query, out or dout, from query 0 of a sequence on: those below `count`.
template <typename T>
struct QueryTileRows {
  using Element = T;
  const T* base;
  int64_t head_stride, row_stride, count;
  QueryTile tile;

  FA_DEVICE QueryTileRows(const ConstTensor& tensor, const Sequence& s, const QueryTile& t,
                          int64_t rows)
      : base(static_cast<const T*>(tensor.data) + offset_of(tensor.stride, s.b0, s.b1, 0) +
             s.first_q * tensor.stride[3]),
        head_stride(tensor.stride[2]),
        row_stride(tensor.stride[3]),
        count(rows),
        tile(t) {}

  FA_DEVICE const T* operator()(int r) const {
    const int64_t i = tile.query(r);
    return i < count ? base + tile.head(r) * head_stride + i * row_stride : nullptr;
  }
  FA_DEVICE const T* any() const {
    return base;
  }
  FA_DEVICE bool are_even() const {
    return tile.pack == 1;
  }
  FA_DEVICE EvenRows<T> even(int most) const {
    return {base + tile.first_head * head_stride + tile.first * row_stride, row_stride, 0,
            static_cast<int>(clamp_of(count - tile.first, 0, most))};
  }
};

// Among lanes 4 g to 4 g + 3, each with four words: lane t gets word t of all four.
FA_DEVICE void transpose_among_four(Chunk& chunk) {
  const int lane = ptx::lane_id();
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool is_upper = (lane & bit) != 0;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t& low = chunk.word[bit == 1 ? 2 * n : n];
      uint32_t& high = chunk.word[bit == 1 ? 2 * n + 1 : n + 2];
      const uint32_t received = ptx::shuffle_xor(is_upper ? low : high, bit);
      (is_upper ? low : high) = received;
    }
  }
}

// Two neighbouring columns of a row, as far as there are so many.
template <typename T>
FA_DEVICE void store_pair(T* row, int64_t stride, bool is_paired, int column, int64_t columns,
                          float low, float high) {
  if (column >= columns) return;
  if constexpr (sizeof(T) == 4) {
    if (is_paired) {
      *reinterpret_cast<float2*>(row + column) = {low, high};
      return;
    }
    row[column * stride] = low;
    if (column + 1 < columns) row[(column + 1) * stride] = high;
  } else {
    const uint32_t word = ptx::pack(low, high, T{});
    if (is_paired) {
      *reinterpret_cast<uint32_t*>(row + column) = word;
      return;
    }
    row[column * stride].bits = static_cast<uint16_t>(word);
    if (column + 1 < columns) row[(column + 1) * stride].bits = static_cast<uint16_t>(word >> 16);
  }
}

}  // namespace fastattn::cuda
