// AMX-BF16 tiles: with vec_avx512_bf16.h, which says how operands lie, all the intrinsics of the
// amx level.
//
// A tile is 16 rows of 64 bytes. The left operand holds 16 rows of 32 bfloat16. The product adds to
// 16 x 16 float.
#pragma once

#include "vec_avx512_bf16.h"

namespace fastattn::cpu {
namespace {

constexpr int kTileRows = 16;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig kTileConfig;

// Tiles are configured while a session lives. Releasing them keeps context switches cheap.
struct TileSession {
  TileSession() {
    _tile_loadconfig(&kTileConfig);
  }
  ~TileSession() {
    _tile_release();
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// C (kRows x kColumns tiles, each 16 x 16 float) = or += A B over `depth` tiles. a: row-major
// bfloat16, lda elements a row. b: the first of `depth` consecutive operand tiles, column_step
// elements to those of the next 16 columns. Tile registers: 0..3 C, 4..5 A, 6..7 B.
template <int kRows, int kColumns>
FA_INLINE void multiply_tiles(const bf16* a, int64_t lda, const bf16* b, int64_t column_step,
                              int depth, float* c, int64_t ldc, bool accumulate) {
  // NOTE: gcc 12 does not know that _tile_loadd reads memory; pending stores must be done before.
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  float* c_below = c + kTileRows * ldc;
  const size_t c_stride = static_cast<size_t>(ldc) * sizeof(float);
  const size_t a_stride = static_cast<size_t>(lda) * sizeof(bf16);
  if (accumulate) {
    _tile_loadd(0, c, c_stride);
    if constexpr (kColumns == 2) _tile_loadd(1, c + kTileColumns, c_stride);
    if constexpr (kRows == 2) _tile_loadd(2, c_below, c_stride);
    if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, c_below + kTileColumns, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (kColumns == 2) _tile_zero(1);
    if constexpr (kRows == 2) _tile_zero(2);
    if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  }
  for (int i = 0; i < depth; ++i) {
    _tile_loadd(4, a + i * kTileDepth, a_stride);
    _tile_loadd(6, b + static_cast<int64_t>(i) * kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + column_step + static_cast<int64_t>(i) * kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a + kTileRows * lda + i * kTileDepth, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_stride);
  if constexpr (kColumns == 2) _tile_stored(1, c + kTileColumns, c_stride);
  if constexpr (kRows == 2) _tile_stored(2, c_below, c_stride);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, c_below + kTileColumns, c_stride);
}

}  // namespace
}  // namespace fastattn::cpu
