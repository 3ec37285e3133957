// New keys and values into the rows of a cache, rotated and quantised on the way, and the queries
// beside them rotated, in one pass. Where a row goes is found here, from arrays that the host does
// not read, so that a captured step serves all lengths.
#pragma once

#include <type_traits>

#include "cache_kernels.h"
#include "cache_places.cuh"

namespace fastattn::cuda {

// Neighbouring numbers, which come and go by accesses of 16 bytes where they are so many.
template <typename C, int kWidth>
struct alignas(kWidth * sizeof(C) < 16 ? kWidth * sizeof(C) : 16) Pack {
  C value[kWidth];
};

template <typename C>
FA_DEVICE float as_float(C x) {
  if constexpr (sizeof(C) == 2) {
    return ptx::to_float(x);
  } else {
    return static_cast<float>(x);
  }
}

// To nearest even. Of int8: x is a quotient by the scale, which may be rounded up by float's last
// bit, and is held to 127.
template <typename C>
FA_DEVICE C rounded(float x) {
  if constexpr (sizeof(C) == 4) {
    return x;
  } else if constexpr (sizeof(C) == 2) {
    return {static_cast<uint16_t>(ptx::pack(x, 0.0f, C{}))};
  } else {
    return static_cast<int8_t>(__float2int_rn(fminf(fmaxf(x, -127.0f), 127.0f)));
  }
}

// Columns of a row from `first` on. Those of packs follow one another.
template <int kWidth, typename C>
FA_DEVICE auto* pack_at(C* row, int64_t stride, int first) {
  using Element = std::remove_const_t<C>;
  using Result =
      std::conditional_t<std::is_const_v<C>, const Pack<Element, kWidth>, Pack<Element, kWidth>>;
  return reinterpret_cast<Result*>(row + (kWidth > 1 ? first : first * stride));
}

// One row of a head: where it comes from and goes to. C: what it is stored as.
template <typename T, typename C>
struct CacheRow {
  const T* from;
  C* to;  // null: nowhere
  int64_t from_stride, to_stride;
  float* scale;  // of int8
  int columns;
  int rotary_dim;  // 0: it is not rotated
};

// A lane goes through its row by packs of kWidth columns. C: what the caches store.
template <typename T, typename C, int kWidth>
class CacheWrite {
  static constexpr bool kInt8 = sizeof(C) == 1;

 public:
  FA_DEVICE explicit CacheWrite(const CacheLaunch& given)
      : params(given),
        p(given.write),
        u(given.write.update),
        part(blockIdx.x % static_cast<uint32_t>(given.token_blocks)),
        token(TokenPlacer(given.write, blockIdx.x / static_cast<uint32_t>(given.token_blocks),
                          static_cast<int>(threadIdx.x) % ptx::kWarpSize)
                  .place()) {}

  // NOTE: the lanes of a warp meet to find the largest number of a row.
  FA_DEVICE void run() {
    const int thread = static_cast<int>(part * blockDim.x + threadIdx.x);
    const int head = thread / params.lanes, first = thread % params.lanes * kWidth;
    const int heads_q = static_cast<int>(p.heads_q);
    if (head < heads_q && token.is_there) copy(query_row(head), first);
    const CacheRow<T, C> row = head < heads_q ? CacheRow<T, C>{} : cache_row(head - heads_q);
    if constexpr (kInt8) {
      const float scale = largest_of_row(row.to != nullptr ? largest(row, first) : 0) / 127.0f;
      if (row.to != nullptr) quantise(row, first, scale);
    } else {
      if (row.to != nullptr) copy(row, first);
    }
  }

 private:
  FA_DEVICE CacheRow<T, T> query_row(int head) const {
    return {row_in<const T>(p.query, token.row, head),
            row_in<T>(p.rotated_query, token.row, head),
            p.query.stride[4],
            p.rotated_query.stride[4],
            nullptr,
            static_cast<int>(u.head_dim),
            static_cast<int>(u.rotary_dim)};
  }

  // Keys, and then values.
  FA_DEVICE CacheRow<T, C> cache_row(int nth) const {
    const int heads = static_cast<int>(u.heads_kv);
    if (!token.is_written || nth >= 2 * heads) return {};
    const bool is_value = nth >= heads;
    const int head = is_value ? nth - heads : nth;
    const ConstTensor& from = is_value ? u.value : u.key;
    const MutableTensor& to = is_value ? u.v_cache : u.k_cache;
    CacheRow<T, C> row = {row_in<const T>(from, token.row, head),
                          row_in<C>(to, token.place, head),
                          from.stride[4],
                          to.stride[4],
                          nullptr,
                          static_cast<int>(is_value ? u.head_dim_v : u.head_dim),
                          is_value ? 0 : static_cast<int>(u.rotary_dim)};
    if constexpr (kInt8) {
      row.scale = row_in<float>(is_value ? u.v_scale : u.k_scale, token.place, head);
    }
    return row;
  }

  template <typename E, typename View>
  static FA_DEVICE E* row_in(const View& tensor, const RowPlace& place, int head) {
    return static_cast<E*>(tensor.data) + offset_of(tensor.stride, place.entry, 0, head) +
           place.row * tensor.stride[3];
  }

  // Calls body(column) for the first column of each of this lane's packs.
  template <typename Row, typename Body>
  FA_DEVICE void for_each_pack(const Row& row, int first, const Body& body) const {
#pragma unroll 1
    for (; first < row.columns; first += params.lanes * kWidth) body(first);
  }

  template <typename Row>
  FA_DEVICE Pack<T, kWidth> load(const Row& row, int first) const {
    return *pack_at<kWidth>(row.from, row.from_stride, first);
  }

  FA_DEVICE void copy(const CacheRow<T, T>& row, int first_column) const {
    for_each_pack(row, first_column, [&](int first) {
      Pack<T, kWidth> pack = load(row, first);
      if (first < row.rotary_dim) {
        float x[kWidth];
        rotate(row, first, pack, x);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) pack.value[c] = rounded<T>(x[c]);
      }
      *pack_at<kWidth>(row.to, row.to_stride, first) = pack;
    });
  }

  FA_DEVICE void load_rotated(const CacheRow<T, C>& row, int first, float (&x)[kWidth]) const {
    const Pack<T, kWidth> pack = load(row, first);
    if (first < row.rotary_dim) return rotate(row, first, pack, x);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) x[c] = as_float(pack.value[c]);
  }

  // The bits of the largest magnitude: as integers, those of infinity and NaN are the largest.
  FA_DEVICE uint32_t largest(const CacheRow<T, C>& row, int first_column) const {
    uint32_t found = 0;
    for_each_pack(row, first_column, [&](int first) {
      float x[kWidth];
      load_rotated(row, first, x);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) found = max_of(found, __float_as_uint(x[c]) & 0x7fffffffu);
    });
    return found;
  }

  // Of all lanes of the row; NaN where something is not finite.
  FA_DEVICE float largest_of_row(uint32_t found) const {
    for (int mask = params.lanes / 2; mask > 0; mask /= 2) {
      found = max_of(found, ptx::shuffle_xor(found, mask));
    }
    return __uint_as_float(found < 0x7f800000u ? found : 0x7fc00000u);
  }

  FA_DEVICE void quantise(const CacheRow<T, C>& row, int first_column, float scale) const {
    const bool usable = scale > 0;  // neither 0 nor NaN
    for_each_pack(row, first_column, [&](int first) {
      float x[kWidth];
      load_rotated(row, first, x);
      Pack<C, kWidth> pack;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) pack.value[c] = rounded<C>(usable ? x[c] / scale : 0.0f);
      *pack_at<kWidth>(row.to, row.to_stride, first) = pack;
    });
    if (first_column == 0) *row.scale = scale;
  }

  template <typename Row>
  FA_DEVICE void rotate(const Row& row, int first, const Pack<T, kWidth>& pack,
                        float (&x)[kWidth]) const {
    if constexpr (kWidth == 1) {  // packs of float64 would take the registers of two
      if (u.table_dtype == DType::kFloat64) return rotate_by<double>(row, first, pack, x);
    }
    switch (u.table_dtype) {
      case DType::kBFloat16: return rotate_by<bf16>(row, first, pack, x);
      case DType::kFloat16: return rotate_by<f16>(row, first, pack, x);
      default: return rotate_by<float>(row, first, pack, x);
    }
  }

  // (x cos - y sin, y cos + x sin) of the pairs (x, y).
  template <typename Table, typename Row>
  FA_DEVICE void rotate_by(const Row& row, int first, const Pack<T, kWidth>& own,
                           float (&x)[kWidth]) const {
    if constexpr (kWidth > 1) {
      if (u.interleaved) return rotate_neighbours<Table>(first, own, x);
    }
    // The other number of each pair is another lane's, and in the first-level cache by now.
    const int half = row.rotary_dim / 2;
    const bool is_second = u.interleaved ? first % 2 == 1 : first >= half;
    const int distance = u.interleaved ? 1 : half;
    const Pack<T, kWidth> other = load(row, is_second ? first - distance : first + distance);
    const int pair = u.interleaved ? first / 2 : is_second ? first - half : first;
    const Pack<Table, kWidth> cos = angles<Table, kWidth>(u.cos, pair);
    const Pack<Table, kWidth> sin = angles<Table, kWidth>(u.sin, pair);
#pragma unroll
    for (int n = 0; n < kWidth; ++n) {
      const float s = as_float(sin.value[n]);
      const float turned = as_float(other.value[n]) * (is_second ? s : -s);
      x[n] = fmaf(as_float(own.value[n]), as_float(cos.value[n]), turned);
    }
    spoil_outside(x);
  }

  template <typename Table>
  FA_DEVICE void rotate_neighbours(int first, const Pack<T, kWidth>& own,
                                   float (&x)[kWidth]) const {
    const Pack<Table, kWidth / 2> cos = angles<Table, kWidth / 2>(u.cos, first / 2);
    const Pack<Table, kWidth / 2> sin = angles<Table, kWidth / 2>(u.sin, first / 2);
#pragma unroll
    for (int n = 0; n < kWidth / 2; ++n) {
      const float a = as_float(own.value[2 * n]), b = as_float(own.value[2 * n + 1]);
      const float c = as_float(cos.value[n]), s = as_float(sin.value[n]);
      x[2 * n] = fmaf(a, c, -(b * s));
      x[2 * n + 1] = fmaf(b, c, a * s);
    }
    spoil_outside(x);
  }

  FA_DEVICE bool is_in_tables() const {
    return 0 <= token.position && token.position < p.table_rows;
  }

  template <typename Table, int kCount>
  FA_DEVICE Pack<Table, kCount> angles(const ConstTensor& table, int first) const {
    if (!is_in_tables()) return {};
    const Table* row = static_cast<const Table*>(table.data) + token.position * table.stride[3];
    return *pack_at<kCount>(row, table.stride[4], first);
  }

  FA_DEVICE void spoil_outside(float (&x)[kWidth]) const {
    if (is_in_tables()) return;
#pragma unroll
    for (int n = 0; n < kWidth; ++n) x[n] = __uint_as_float(0x7fc00000u);
  }

  const CacheLaunch& params;
  const CacheWriteParams& p;
  const CacheUpdateParams& u;
  const uint32_t part;  // of the rows of a token
  const PlacedToken token;
};

template <typename T, typename C, int kWidth>
FA_KERNEL(kMostCacheThreads, 4)
void kv_cache_update(const __grid_constant__ CacheLaunch params) {
  CacheWrite<T, C, kWidth>(params).run();
}

}  // namespace fastattn::cuda
