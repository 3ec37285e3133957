// The functions of rotary embedding that a level offers for one dtype.
#pragma once

#include <fastattn/api.h>

namespace fastattn::cpu {

struct RopeKernels {
  // Rotates tokens [first, last) of batch entry b, in all heads of all operands. `scratch` holds
  // rope_scratch_bytes(p, last - first) bytes.
  void (*rotate_tokens)(const RopeParams& p, int64_t b, int64_t first, int64_t last, char* scratch);
};

// The angles of each token, as rotate_row reads them: at most rotary_dim cosines and sines.
FA_INLINE size_t rope_scratch_bytes(const RopeParams& p, int64_t tokens) {
  const size_t real = p.dtype == DType::kFloat64 ? 8 : 4;
  return static_cast<size_t>(2 * tokens * p.rotary_dim) * real;
}

}  // namespace fastattn::cpu
