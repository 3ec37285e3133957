// The entries of a batch, and which keys a row sees by position. Both backends ask here.
#pragma once

#include "params.h"

namespace fastattn {

// One entry of the batch (or one packed sequence).
struct Sequence {
  int64_t b0, b1, index;     // index = b0 * batch1 + b1
  int64_t first_q, first_k;  // where the rows begin in packed tensors, or after the hidden rows of
                             // a cache; else 0
  int64_t first_column;      // of mask and bias
  int64_t rows_q, rows_k;    // rows that belong to the sequence
  int64_t len_q, len_k;      // of these, the ones that take part
  int64_t diagonal;          // p_j - p_i = j - i + diagonal
  int64_t first_seen;        // of the keys, by any row
};

// Keys [first, last) or query rows [first, last).
struct Range {
  int64_t first, last;
};

FA_INLINE bool is_empty(Range r) {
  return r.first >= r.last;
}

FA_INLINE Range intersect(Range a, Range b) {
  return {max_of(a.first, b.first), min_of(a.last, b.last)};
}

// Keys that row i sees by position and length; mask is not considered.
FA_INLINE Range visible_keys(const AttentionParams& p, const Sequence& s, int64_t i) {
  const int64_t centre = i - s.diagonal;
  const int64_t first = p.window_left < 0 ? 0 : max_of<int64_t>(0, centre - p.window_left);
  const int64_t last =
      p.window_right < 0 ? s.len_k : min_of<int64_t>(s.len_k, centre + p.window_right + 1);
  return {first, last};
}

// Keys that at least one of the rows sees. Both ends of visible_keys never fall as i grows.
FA_INLINE Range keys_seen_by_any(const AttentionParams& p, const Sequence& s, Range rows) {
  return {visible_keys(p, s, rows.first).first, visible_keys(p, s, rows.last - 1).last};
}

// Keys that every one of the rows sees.
FA_INLINE Range keys_seen_by_all(const AttentionParams& p, const Sequence& s, Range rows) {
  return {visible_keys(p, s, rows.last - 1).first, visible_keys(p, s, rows.first).last};
}

// Rows that see at least one of the keys.
FA_INLINE Range rows_seeing_any(const AttentionParams& p, const Sequence& s, Range keys) {
  Range rows = {0, s.len_q};
  if (p.window_right >= 0)
    rows.first = max_of(rows.first, keys.first + s.diagonal - p.window_right);
  if (p.window_left >= 0) {
    rows.last = min_of(rows.last, keys.last - 1 + s.diagonal + p.window_left + 1);
  }
  return rows;
}

// Rows that see every one of the keys.
FA_INLINE Range rows_seeing_all(const AttentionParams& p, const Sequence& s, Range keys) {
  if (keys.last > s.len_k) return {0, 0};
  Range rows = {0, s.len_q};
  if (p.window_right >= 0) {
    rows.first = max_of(rows.first, keys.last - 1 + s.diagonal - p.window_right);
  }
  if (p.window_left >= 0)
    rows.last = min_of(rows.last, keys.first + s.diagonal + p.window_left + 1);
  return rows;
}

FA_INLINE int64_t clamp_of(int64_t x, int64_t least, int64_t most) {
  return min_of(max_of(x, least), most);
}

// NOTE: the host cannot read the lengths of a CUDA call, so what is out of range has not been
// refused: it is brought into range here, and no kernel leaves its tensors.
FA_INLINE Sequence sequence_at(const AttentionParams& p, int64_t index) {
  Sequence s = {};
  s.index = index;
  s.b0 = index, s.b1 = 0;
  if (p.batch1 > 1) {
    s.b0 = index / p.batch1;
    s.b1 = index - s.b0 * p.batch1;
  }
  s.rows_q = p.seqlen_q;
  s.rows_k = p.seqlen_k;
  if (p.cu_seqlens_q.data != nullptr) {
    s.first_q = clamp_of(index_at(p.cu_seqlens_q, index), 0, p.total_q);
    s.rows_q = clamp_of(index_at(p.cu_seqlens_q, index + 1) - s.first_q, 0,
                        min_of(p.seqlen_q, p.total_q - s.first_q));
  }
  if (p.cu_seqlens_k.data != nullptr) {
    s.first_k = clamp_of(index_at(p.cu_seqlens_k, index), 0, p.total_k);
    s.rows_k = clamp_of(index_at(p.cu_seqlens_k, index + 1) - s.first_k, 0,
                        min_of(p.seqlen_k, p.total_k - s.first_k));
  }
  s.len_q = p.query_lengths.data != nullptr
                ? clamp_of(index_at(p.query_lengths, index), 0, s.rows_q)
                : s.rows_q;
  s.len_k = s.rows_k;
  if (p.key_lengths.data != nullptr) {
    // A ring counts keys that it no longer holds.
    const int64_t most = p.cache.ring_rows > 0 ? INT64_MAX : s.rows_k;
    const int64_t added = p.cache.appended ? s.len_q : 0;
    s.len_k = clamp_of(index_at(p.key_lengths, index) + added, 0, most);
  }
  if (p.cache.key_starts.data != nullptr) {
    // Counting keys from the first visible one gives a left-padded sequence the tiles, and so the
    // bits, that it has alone.
    s.first_k = s.first_column = clamp_of(index_at(p.cache.key_starts, index), 0, s.len_k);
    s.len_k -= s.first_k;
  }
  const int64_t corner = p.top_left ? 0 : s.len_k - s.len_q;
  s.diagonal = p.key_offset - p.query_offset - corner;
  const Range seen = s.len_q > 0 ? keys_seen_by_any(p, s, {0, s.len_q}) : Range{0, 0};
  s.first_seen = is_empty(seen) ? 0 : seen.first;
  return s;
}

// NOTE: as sequence_at, for pages that the host has not looked at.
FA_INLINE int64_t cache_page(const CacheView& cache, const Sequence& seq, int64_t page) {
  const int64_t entry = index_at(cache.block_table, seq.index * cache.pages_per_sequence + page);
  return clamp_of(entry, 0, cache.entries - 1);
}

// Row `key` of a sequence in a cache, and how many rows after it, up to `most`, follow it in
// memory.
struct CacheRun {
  int64_t entry, row, count;
};

FA_INLINE CacheRun cache_run(const CacheView& cache, const Sequence& seq, int64_t key,
                             int64_t most) {
  if (cache.page_rows > 0) {
    const int64_t page = key / cache.page_rows, row = key - page * cache.page_rows;
    return {cache_page(cache, seq, page), row, min_of(most, cache.page_rows - row)};
  }
  if (cache.ring_rows > 0) {
    const int64_t row = key % cache.ring_rows;
    return {seq.b0, row, min_of(most, cache.ring_rows - row)};
  }
  return {seq.b0, key, most};
}

FA_INLINE bool has_row_table(const CacheView& cache) {
  return cache.page_rows > 0 || cache.ring_rows > 0;
}

FA_INLINE bool is_int8(const CacheView& cache) {
  return cache.key_scale.data != nullptr;
}

}  // namespace fastattn
