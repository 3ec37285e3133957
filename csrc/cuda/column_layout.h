// How elements of a row lie in global memory, as far as kernels load and store them differently.
#pragma once

#include "fastattn/types.h"

namespace fastattn::cuda {

struct ColumnLayout {
  int32_t columns;  // of these; the others of a tile are zero
  bool is_chunked;  // contiguous, and every row begins at a multiple of 16 bytes
  int64_t stride;   // between two columns
};

}  // namespace fastattn::cuda
