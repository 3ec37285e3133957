// What TMA is told of the tensors of attention.
#pragma once

#include "device.cuh"
#include "layouts.h"
#include "tensor_map.h"

namespace fastattn::cuda {

// Why no kernel that reads through these maps can run, or nullptr where they can.
const char* sm90_build_obstacle(const DeviceLimits& limits);

// Whether TMA can read a tensor shaped like the queries, or like the keys: rows begin at multiples
// of 16 bytes, and it does not repeat in memory.
bool takes_queries(const AttentionParams& params, const ConstTensor& tensor, int64_t columns);
bool takes_keys(const AttentionParams& params, const ConstTensor& tensor, int64_t columns);

// Of dimensions (column, head, row, batch1, batch0); packed rows have one batch. A box is 64
// columns of so many rows, which are queries times `pack` heads.
cudaError_t encode_queries(TensorMap* map, const AttentionParams& params, const ConstTensor& tensor,
                           int64_t columns, int pack, int rows);

// Of the rows of a tile of keys, so many lie together in a tensor, or in the pages or rings of a
// cache, wherever the tile begins. The cache has a multiple of 8 of them, and so has the tile.
int box_rows(const CacheView& cache, int keys);

// Of dimensions (column, row, head, batch1, batch0); of a paged cache or a ring with its entries
// for batch0.
cudaError_t encode_keys(TensorMap* map, const AttentionParams& params, const ConstTensor& tensor,
                        int64_t columns, int rows);

}  // namespace fastattn::cuda
