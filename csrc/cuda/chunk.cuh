// Numbers in units of 16 bytes, what a thread loads and stores at once, from and to rows of any
// strides.
#pragma once

#include "column_layout.h"
#include "ptx.cuh"

namespace fastattn::cuda {

struct alignas(16) Chunk {
  uint32_t word[4];
};

template <typename T>
FA_DEVICE uint32_t bits_of(T x) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(x);
  } else if constexpr (sizeof(T) == 2) {
    return x.bits;
  } else {
    return static_cast<uint8_t>(x);
  }
}

// An int8 is exact in every dtype.
template <typename T>
FA_DEVICE uint32_t bits_of_int8(int8_t x) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(static_cast<float>(x));
  } else {
    return ptx::pack(static_cast<float>(x), 0.0f, T{});
  }
}

// A chunk of T from elements of C that lie anywhere; those from `columns` on are zero.
template <typename T, typename C>
FA_DEVICE Chunk gather_chunk(const C* row, int64_t column_stride, int first, int columns) {
  constexpr int kColumns = 16 / sizeof(T), kPerWord = 4 / sizeof(T);
  Chunk chunk = {};
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (first + c >= columns) continue;
    const C x = row[(first + c) * column_stride];
    uint32_t bits;
    if constexpr (sizeof(C) < sizeof(T)) {
      bits = bits_of_int8<T>(x);
    } else {
      bits = bits_of(x);
    }
    chunk.word[c / kPerWord] |= bits << (c % kPerWord * 8 * sizeof(T));
  }
  return chunk;
}

// Columns first.. of a row, as far as there are so many; zeros behind them.
template <typename T>
FA_DEVICE Chunk load_chunk(const T* row, const ColumnLayout& layout, int first) {
  constexpr int kColumns = 16 / sizeof(T);
  if (layout.is_chunked && first + kColumns <= layout.columns) {
    const uint4 words = *reinterpret_cast<const uint4*>(row + first);
    return {{words.x, words.y, words.z, words.w}};
  }
  return gather_chunk<T>(row, layout.stride, first, layout.columns);
}

// A chunk to columns first.. of a row, as far as there are so many.
template <typename T>
FA_DEVICE void store_chunk(T* row, const ColumnLayout& layout, int first, const Chunk& chunk) {
  constexpr int kColumns = 16 / sizeof(T), kPerWord = 4 / sizeof(T);
  if (layout.is_chunked && first + kColumns <= layout.columns) {
    *reinterpret_cast<Chunk*>(row + first) = chunk;
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (first + c >= layout.columns) continue;
    const uint32_t bits = chunk.word[c / kPerWord] >> (c % kPerWord * 8 * sizeof(T) % 32);
    T& to = row[(first + c) * layout.stride];
    if constexpr (sizeof(T) == 4) {
      to = __uint_as_float(bits);
    } else {
      to.bits = static_cast<uint16_t>(bits);
    }
  }
}

// The numbers of a chunk, and back, rounded to nearest even.
template <typename T>
FA_DEVICE void unpack(const Chunk& chunk, float (&x)[16 / sizeof(T)]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      x[w] = __uint_as_float(chunk.word[w]);
    } else {
      x[2 * w] = ptx::to_float(T{static_cast<uint16_t>(chunk.word[w])});
      x[2 * w + 1] = ptx::to_float(T{static_cast<uint16_t>(chunk.word[w] >> 16)});
    }
  }
}

template <typename T>
FA_DEVICE Chunk pack_chunk(const float (&x)[16 / sizeof(T)]) {
  Chunk chunk;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      chunk.word[w] = __float_as_uint(x[w]);
    } else {
      chunk.word[w] = ptx::pack(x[2 * w], x[2 * w + 1], T{});
    }
  }
  return chunk;
}

FA_DEVICE float float_of(float x) {
  return x;
}
FA_DEVICE float float_of(double x) {
  return static_cast<float>(x);
}
template <typename T>
FA_DEVICE float float_of(T x) {
  return ptx::to_float(x);
}

// The first numbers of a row of any dtype, zeros where there are none. Chunked, it begins at a
// multiple of 16 bytes, or of all of them where they are fewer.
template <typename C, int kCount>
FA_DEVICE void load_floats(const C* row, const ColumnLayout& layout, float (&x)[kCount]) {
  if (layout.is_chunked && kCount <= layout.columns) {
    constexpr int kPart = kCount * sizeof(C) < 16 ? kCount : 16 / sizeof(C);
    struct alignas(kPart * sizeof(C)) Part {
      C x[kPart];
    };
#pragma unroll
    for (int i = 0; i < kCount; i += kPart) {
      const Part part = *reinterpret_cast<const Part*>(row + i);
#pragma unroll
      for (int k = 0; k < kPart; ++k) x[i + k] = float_of(part.x[k]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = i < layout.columns ? float_of(row[i * layout.stride]) : 0.0f;
  }
}

// body<type>() for what a tensor holds.
template <typename Body>
FA_DEVICE void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body.template operator()<float>();
    case DType::kBFloat16: return body.template operator()<bf16>();
    case DType::kFloat16: return body.template operator()<f16>();
    case DType::kFloat64: return body.template operator()<double>();
  }
}

}  // namespace fastattn::cuda
