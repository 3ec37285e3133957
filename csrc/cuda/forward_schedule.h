// What the forward kernel of Hopper is told besides: in which order its blocks, which stay, take
// the tiles of queries, and where TMA finds the tensors.
#pragma once

#include "forward_params.h"
#include "tensor_map.h"

namespace fastattn::cuda {

// Tiles of the same head read the same keys, so heads come in sections whose keys and values the L2
// cache holds together. Within a section the last tiles of all heads come first: under a causal
// mask they see the most keys, and what is short comes last and evens out.
struct TileSchedule {
  uint32_t count;    // of all tiles
  uint32_t tiles;    // of a head, counted over heads, parts of the keys and sequences
  uint32_t section;  // heads
};

// The n-th tile, as ForwardPlan counts them.
FA_INLINE uint32_t tile_at(const TileSchedule& schedule, uint32_t n) {
  const uint32_t per_section = schedule.section * schedule.tiles;
  const uint32_t first_head = n / per_section * schedule.section, at = n % per_section;
  const uint32_t heads = schedule.count / schedule.tiles;
  const uint32_t width = min_of(schedule.section, heads - first_head);
  return (first_head + at % width) * schedule.tiles + at / width;
}

struct ForwardParamsSm90 {
  ForwardParams base;
  TileSchedule schedule;
  // (column, head, row, batch1, batch0) of queries; (column, row, head, batch1, batch0) of the
  // others, with the entries of a cache for batch0. Packed tensors have one batch.
  TensorMap query_map, key_map, value_map;
  int32_t query_rows;  // of a box of queries: all of a tile, or as many whole queries as fit
  int32_t box_rows;    // of a box of keys, 8 at least
};

}  // namespace fastattn::cuda
