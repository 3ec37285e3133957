// The random numbers of dropout: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", 2011), with the counters of csrc/cpu/philox.inc, so that both backends drop the same.
#pragma once

#include "fastattn/params.h"
#include "ptx.cuh"

namespace fastattn::cuda {

struct Dropout {
  uint32_t key0, key1, offset;
  uint64_t threshold;
  float survivor;  // 1 / (1 - p)

  // Params: AttentionParams or NormParams.
  template <typename Params>
  FA_DEVICE explicit Dropout(const Params& p) {
    uint64_t seed = p.philox_seed, first = p.philox_offset;
    if (p.philox.data != nullptr) {
      seed = static_cast<uint64_t>(index_at(p.philox, 0));
      first = static_cast<uint64_t>(index_at(p.philox, 1));
    }
    key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    offset = static_cast<uint32_t>(first);
    threshold = static_cast<uint64_t>(p.dropout_p * 4294967296.0);
    survivor = p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.0f;
  }

  // The four numbers of columns (keys) 4 group to 4 group + 4 of a row; `head` counts over the
  // batch, and is for norms the upper half of the row's number.
  FA_DEVICE uint4 numbers(uint32_t group, uint32_t row, uint32_t head) const {
    uint4 x = {group, row, head, offset};
    uint32_t a = key0, b = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = static_cast<uint64_t>(x.x) * 0xD2511F53u;
      const uint64_t product1 = static_cast<uint64_t>(x.z) * 0xCD9E8D57u;
      x = {static_cast<uint32_t>(product1 >> 32) ^ x.y ^ a, static_cast<uint32_t>(product1),
           static_cast<uint32_t>(product0 >> 32) ^ x.w ^ b, static_cast<uint32_t>(product0)};
      a += 0x9E3779B9u;
      b += 0xBB67AE85u;
    }
    return x;
  }

  FA_DEVICE float factor(uint32_t number) const {
    return number >= threshold ? survivor : 0.0f;
  }

  // The one of key j.
  FA_DEVICE uint32_t number(int64_t j, int64_t row, int64_t head) const {
    const uint4 x = numbers(static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(row),
                            static_cast<uint32_t>(head));
    const uint32_t low = j & 1 ? x.y : x.x, high = j & 1 ? x.w : x.z;
    return j & 2 ? high : low;
  }

  // Whether dropout drops its weight.
  FA_DEVICE bool drops(int64_t j, int64_t row, int64_t head) const {
    return number(j, row, head) < threshold;
  }

  // What the weights of keys j and j + 1, j even, are multiplied by.
  FA_DEVICE float2 keep_pair(int64_t j, int64_t row, int64_t head) const {
    const uint4 x = numbers(static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(row),
                            static_cast<uint32_t>(head));
    return {factor(j & 2 ? x.z : x.x), factor(j & 2 ? x.w : x.y)};
  }
};

}  // namespace fastattn::cuda
