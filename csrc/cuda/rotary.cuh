// The rotation of pairs of columns, as rope_params.h defines it.
#pragma once

#include "chunk.cuh"

namespace fastattn::cuda {

// In float32; what rounds is the same for every caller.
FA_DEVICE void rotate_pair(float& x, float& y, float cos, float sin) {
  const float turned = __fmaf_rn(x, cos, -__fmul_rn(y, sin));
  y = __fmaf_rn(y, cos, __fmul_rn(x, sin));
  x = turned;
}

// Two chunks of a row and the angles of their pairs: of column i of both, or interleaved, of
// columns 2 i and 2 i + 1, those of the first chunk before those of the second.
template <typename T>
FA_DEVICE void rotate_chunks(Chunk& first, Chunk& second, const float (&cos)[16 / sizeof(T)],
                             const float (&sin)[16 / sizeof(T)], bool interleaved) {
  constexpr int kColumns = 16 / sizeof(T);
  float x[kColumns], y[kColumns];
  unpack<T>(first, x);
  unpack<T>(second, y);
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      rotate_pair(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
      rotate_pair(y[2 * i], y[2 * i + 1], cos[kColumns / 2 + i], sin[kColumns / 2 + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) rotate_pair(x[i], y[i], cos[i], sin[i]);
  }
  first = pack_chunk<T>(x);
  second = pack_chunk<T>(y);
}

}  // namespace fastattn::cuda
