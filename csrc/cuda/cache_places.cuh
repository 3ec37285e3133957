// Where a new row comes from and goes to, as arrays on the device say it. Nothing of what they hold
// has been checked: what leads out of the caches is not followed.
#pragma once

#include "fastattn/kv_cache_params.h"
#include "ptx.cuh"

namespace fastattn::cuda {

// A row of key, value and query, or of the caches.
struct RowPlace {
  int64_t entry, row;
};

struct PlacedToken {
  RowPlace row, place;
  int64_t position;  // of the tables
  bool is_there;     // one of the rows of its sequence
  bool is_written;
};

// The last sequence that begins at a packed row or before it.
FA_DEVICE int64_t sequence_of(const NewRows& rows, int64_t row) {
  int64_t found = 0, end = rows.batch;
  while (end - found > 1) {
    const int64_t middle = (found + end) / 2;
    if (index_at(rows.cu_seqlens, middle) <= row) {
      found = middle;
    } else {
      end = middle;
    }
  }
  return found;
}

class TokenPlacer {
 public:
  // Lanes of a warp have the same token.
  FA_DEVICE TokenPlacer(const CacheWriteParams& params, uint32_t token, int lane_of_warp)
      : p(params), rows(params.rows), lane(lane_of_warp) {
    if (is_packed(rows)) {
      const bool slots = rows.positions_of == PositionsOf::kSlots;
      b = slots ? 0 : sequence_of(rows, token);
      const int64_t begin = slots ? 0 : index_at(rows.cu_seqlens, b);
      const int64_t end = slots ? rows.rows : index_at(rows.cu_seqlens, b + 1);
      row = {0, token};
      i = token - begin;
      count = min_of(end, rows.rows) - begin;
    } else {
      const uint32_t per_sequence = static_cast<uint32_t>(rows.rows);
      b = token / per_sequence;
      i = token % per_sequence;
      row = {b, i};
      count = rows.rows;
    }
    if (rows.lengths.data != nullptr) count = min_of(index_at(rows.lengths, b), count);
  }

  FA_DEVICE PlacedToken place() const {
    PlacedToken token = {row, {0, 0}, 0, 0 <= i && i < count, false};
    if (!token.is_there) return token;
    const int64_t position = position_of(i);
    token.position = table_position(position);
    if (p.update.heads_kv > 0 && locate(position, &token.place)) {
      token.is_written = !is_replaced(position, token.place);
    }
    return token;
  }

 private:
  FA_DEVICE int64_t position_of(int64_t nth) const {
    if (rows.positions_of != PositionsOf::kSequences) {
      return index_at(rows.positions, b * rows.rows + nth);
    }
    return index_at(rows.positions, b) + nth - (rows.stored ? count : 0);
  }

  FA_DEVICE int64_t table_position(int64_t position) const {
    if (rows.rope_positions.data != nullptr) {
      return index_at(rows.rope_positions, b * rows.rows + i);
    }
    if (rows.key_starts.data == nullptr) return position;
    return max_of<int64_t>(position - index_at(rows.key_starts, b), 0);
  }

  // False where a position has no place.
  FA_DEVICE bool locate(int64_t position, RowPlace* place) const {
    if (position < 0 || p.cache_rows == 0) return false;
    if (rows.positions_of == PositionsOf::kSlots) {
      *place = {position / p.cache_rows, position % p.cache_rows};
    } else if (p.block_table.data != nullptr) {
      const int64_t page = position / p.cache_rows;
      if (page >= p.pages_per_sequence) return false;
      *place = {index_at(p.block_table, b * p.pages_per_sequence + page), position % p.cache_rows};
    } else {
      *place = {b, p.ring ? position % p.cache_rows : position};
    }
    return 0 <= place->entry && place->entry < p.entries && place->row < p.cache_rows;
  }

  // Whether a later row goes to the same place, so that the result does not depend on which of them
  // comes first. Rows that follow one another meet in a ring alone.
  FA_DEVICE bool is_replaced(int64_t position, const RowPlace& place) const {
    if (rows.positions_of == PositionsOf::kSequences) return p.ring && i + p.cache_rows < count;
    bool found = false;
    for (int64_t j = i + 1 + lane; j < count; j += ptx::kWarpSize) {
      const int64_t later = position_of(j);
      found |= later == position || (p.ring && later >= 0 && later % p.cache_rows == place.row);
    }
    return ptx::any_in_warp(found);
  }

  const CacheWriteParams& p;
  const NewRows& rows;
  const int lane;
  int64_t b, i, count;  // row i of the `count` ones of sequence b
  RowPlace row;
};

}  // namespace fastattn::cuda
