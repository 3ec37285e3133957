// What both passes of a norm know of a row: its statistics, dropout, and the parameters.
#pragma once

#include "norm_kernels.h"
#include "philox.cuh"
#include "rows.cuh"

namespace fastattn::cuda {

// Columns of a run: 16 bytes of the input.
template <typename T>
constexpr int kRunColumns = 16 / sizeof(T);

static_assert(sizeof(RowSum::Shared) == kRowSumBytes);

// So many of them are computed with at a time: few registers for what comes and goes.
constexpr int kPartColumns = 4;
static_assert(kPartColumns * sizeof(float) == sizeof(float4));

// n = (x - mean) * rstd + shift. RMS norms have mean 0 and shift 0.
struct RowStatistics {
  float mean, shift, rstd;

  FA_DEVICE float normalise(float x) const {
    return fmaf(x - mean, rstd, shift);
  }
};

FA_DEVICE RowStatistics load_statistics(NormKind kind, const float* saved) {
  if (kind == NormKind::kLayer) return {saved[0], saved[1], saved[2]};
  return {0.0f, 0.0f, saved[0]};
}

FA_DEVICE void store_statistics(NormKind kind, const RowStatistics& s, float* saved) {
  if (kind == NormKind::kLayer) {
    saved[0] = s.mean;
    saved[1] = s.shift;
    saved[2] = s.rstd;
  } else {
    saved[0] = s.rstd;
  }
}

// An absent weight of Gemma's is 0, to which 1 is added.
FA_DEVICE Parameter weight_of(const NormParams& p, const WholeRuns& whole) {
  const float addend = p.kind == NormKind::kRmsGemma ? 1.0f : 0.0f;
  return {p.weight, p.weight_dtype, whole.weight, 1.0f, addend};
}

FA_DEVICE Parameter bias_of(const NormParams& p, const WholeRuns& whole) {
  return {p.bias, p.bias_dtype, whole.bias, 0.0f, 0.0f};
}

// A parameter as floats in shared memory, so that its dtype, and whether it is there, is asked once
// a block and not once a row. Each thread has a copy of its own columns: none waits for another.
template <int kParts>
class StagedParameter {
  // 16 bytes; an odd number of them, so that threads beside each other meet no bank twice.
  static constexpr int kStride = kParts + kStagedPadding;
  static_assert(kParts == 0 || kStride % 2 == 1);

 public:
  // The parameter is the `index`th of its block.
  FA_DEVICE StagedParameter(void* memory, int index)
      : own(static_cast<float4*>(memory) +
            kStride * ((index * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x)) {}

  FA_DEVICE void store(int part, const float (&x)[kPartColumns]) const {
    ptx::store_shared(own + part, float4{x[0], x[1], x[2], x[3]});
  }
  FA_DEVICE void load(int part, float (&x)[kPartColumns]) const {
    const float4 loaded = ptx::load_shared(own + part);
    x[0] = loaded.x, x[1] = loaded.y, x[2] = loaded.z, x[3] = loaded.w;
  }
  // What lies behind all of them.
  FA_DEVICE void* end() const {
    return own + kStride * (blockDim.x * blockDim.y - (threadIdx.y * blockDim.x + threadIdx.x));
  }

 private:
  float4* const own;
};

// What dropout multiplies the columns of a row by; `row` is its number.
struct RowDropout {
  Dropout dropout;
  int64_t row;

  template <int kCount>
  FA_DEVICE void apply_to(int64_t first, float (&x)[kCount]) const {
#pragma unroll
    for (int c = 0; c < kCount; c += 4) {
      const uint4 numbers =
          dropout.numbers(static_cast<uint32_t>((first + c) >> 2), static_cast<uint32_t>(row),
                          static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32));
      x[c] *= dropout.factor(numbers.x);
      x[c + 1] *= dropout.factor(numbers.y);
      x[c + 2] *= dropout.factor(numbers.z);
      x[c + 3] *= dropout.factor(numbers.w);
    }
  }
};

}  // namespace fastattn::cuda
