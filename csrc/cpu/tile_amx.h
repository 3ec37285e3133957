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
  explicit TileSession(const TileConfig& config = kTileConfig) {
    _tile_loadconfig(&config);
  }
  ~TileSession() {
    _tile_release();
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// A product of up to 2 x 2 tiles of sums, and where it belongs.
struct TileProduct {
  const bf16* a;  // rows of 32 elements, lda elements apart
  int64_t lda;
  int64_t a_step;       // to the next 32 elements of these rows
  const bf16* b;        // the first of `depth` consecutive operand tiles
  int64_t column_step;  // to those of the next 16 columns
  int depth;
  float* c;
  int64_t ldc;
  bool accumulate;  // C += A B, or =
};

// The sums in the tile registers. Tile instructions issue in order, and a store waits for the
// products before it: one right behind them would hold up all that follow, for a quarter of the
// time of a product 4 tiles deep. So sums are stored while the next product starts, or by flush().
// The right operand is loaded past the nearest cache: it is read once for all rows of a, and would
// drive out what is read and written again.
// Tile registers: 0..3 sums, 4..5 left operand, 6..7 right operand.
// (The intrinsics of gcc 12 want the number of a register written out.)
class TileSums {
 public:
  // Calls `between` after each tile product, with its number of the up to four that share operands.
  // A product keeps one of the two vector ports busy for 16 cycles: work on the other one costs
  // nothing, if it stands so near that the processor sees it.
  template <int kRows, int kColumns, typename Between>
  __attribute__((always_inline)) void multiply(const TileProduct& p, Between&& between) {
    // NOTE: gcc 12 does not know that _tile_loadd reads memory; stores must be done before.
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    const size_t a_stride = static_cast<size_t>(p.lda) * sizeof(bf16);
    const size_t c_stride = static_cast<size_t>(p.ldc) * sizeof(float);
    const bf16 *a = p.a, *a_below = p.a + kTileRows * p.lda;
    const bf16 *b = p.b, *b_right = p.b + p.column_step;
    float* c_below = p.c + kTileRows * p.ldc;
    _tile_loadd(4, a, a_stride);
    _tile_stream_loadd(6, b, 64);
    if constexpr (kColumns == 2) _tile_stream_loadd(7, b_right, 64);
    if constexpr (kRows == 2) _tile_loadd(5, a_below, a_stride);
    store<0>();
    start<0>(p, p.c, c_stride);
    _tile_dpbf16ps(0, 4, 6);
    between.template after<0>();
    store<1>();
    if constexpr (kColumns == 2) {
      start<1>(p, p.c + kTileColumns, c_stride);
      _tile_dpbf16ps(1, 4, 7);
      between.template after<1>();
    }
    store<2>();
    if constexpr (kRows == 2) {
      start<2>(p, c_below, c_stride);
      _tile_dpbf16ps(2, 5, 6);
      between.template after<2>();
    }
    store<3>();
    if constexpr (kRows == 2 && kColumns == 2) {
      start<3>(p, c_below + kTileColumns, c_stride);
      _tile_dpbf16ps(3, 5, 7);
      between.template after<3>();
    }
#pragma GCC unroll 1  // else the addresses of many steps fill all registers
    for (int i = 1; i < p.depth; ++i) {
      a += p.a_step, a_below += p.a_step;
      b += kTileElements, b_right += kTileElements;
      _tile_loadd(4, a, a_stride);
      _tile_stream_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      between.template after<0>();
      if constexpr (kColumns == 2) {
        _tile_stream_loadd(7, b_right, 64);
        _tile_dpbf16ps(1, 4, 7);
        between.template after<1>();
      }
      if constexpr (kRows == 2) {
        _tile_loadd(5, a_below, a_stride);
        _tile_dpbf16ps(2, 5, 6);
        between.template after<2>();
        if constexpr (kColumns == 2) {
          _tile_dpbf16ps(3, 5, 7);
          between.template after<3>();
        }
      }
    }
    c_ = p.c;
    ldc_ = p.ldc;
    rows_ = kRows;
    columns_ = kColumns;
  }

  __attribute__((always_inline)) void flush() {
    store<0>();
    store<1>();
    store<2>();
    store<3>();
    rows_ = 0;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
  }

 private:
  template <int kTile>
  FA_INLINE void start(const TileProduct& p, const float* c, size_t c_stride) {
    if (p.accumulate) {
      if constexpr (kTile == 0) _tile_loadd(0, c, c_stride);
      if constexpr (kTile == 1) _tile_loadd(1, c, c_stride);
      if constexpr (kTile == 2) _tile_loadd(2, c, c_stride);
      if constexpr (kTile == 3) _tile_loadd(3, c, c_stride);
    } else {
      if constexpr (kTile == 0) _tile_zero(0);
      if constexpr (kTile == 1) _tile_zero(1);
      if constexpr (kTile == 2) _tile_zero(2);
      if constexpr (kTile == 3) _tile_zero(3);
    }
  }

  template <int kTile>
  __attribute__((always_inline)) void store() {
    constexpr int kRow = kTile / 2, kColumn = kTile % 2;
    if (rows_ <= kRow || columns_ <= kColumn) return;
    float* out = c_ + kRow * kTileRows * ldc_ + kColumn * kTileColumns;
    const size_t stride = static_cast<size_t>(ldc_) * sizeof(float);
    if constexpr (kTile == 0) _tile_stored(0, out, stride);
    if constexpr (kTile == 1) _tile_stored(1, out, stride);
    if constexpr (kTile == 2) _tile_stored(2, out, stride);
    if constexpr (kTile == 3) _tile_stored(3, out, stride);
  }

  float* c_ = nullptr;
  int64_t ldc_ = 0;
  int rows_ = 0, columns_ = 0;  // tiles that wait to be stored
};

// Products of a few rows (decode), whose operands are all near. Tile registers: 0..3 sums and 4
// left operand, with so many rows; 5..7 whole.
FA_INLINE TileConfig few_rows_config(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 5; ++tile) config.rows[tile] = static_cast<uint8_t>(rows);
  return config;
}

// c (16 x 16) = a b, for a left operand of 16 whole rows and 32 * depth channels.
FA_INLINE void multiply_rows_of_16(const bf16* a, int64_t lda, const bf16* b, int depth, float* c) {
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  const size_t a_stride = static_cast<size_t>(lda) * sizeof(bf16);
  _tile_zero(7);
#pragma GCC unroll 1
  for (int i = 0; i < depth; ++i, a += kTileDepth, b += kTileElements) {
    _tile_loadd(5, a, a_stride);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(7, 5, 6);
  }
  _tile_stored(7, c, 64);
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

// c (few x 16 * kTiles) += a b, for a left operand of 32 columns; the tiles of b lie one behind the
// other.
template <int kTiles>
FA_INLINE void accumulate_few_rows(const bf16* a, int64_t lda, const bf16* b, float* c,
                                   int64_t ldc) {
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  const size_t c_stride = static_cast<size_t>(ldc) * sizeof(float);
  _tile_loadd(4, a, static_cast<size_t>(lda) * sizeof(bf16));
  _tile_loadd(0, c, c_stride);
  if constexpr (kTiles > 1) _tile_loadd(1, c + kTileColumns, c_stride);
  if constexpr (kTiles > 2) _tile_loadd(2, c + 2 * kTileColumns, c_stride);
  if constexpr (kTiles > 3) _tile_loadd(3, c + 3 * kTileColumns, c_stride);
  _tile_loadd(5, b, 64);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (kTiles > 1) {
    _tile_loadd(6, b + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (kTiles > 2) {
    _tile_loadd(7, b + 2 * kTileElements, 64);
    _tile_dpbf16ps(2, 4, 7);
  }
  if constexpr (kTiles > 3) {
    _tile_loadd(5, b + 3 * kTileElements, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, c, c_stride);
  if constexpr (kTiles > 1) _tile_stored(1, c + kTileColumns, c_stride);
  if constexpr (kTiles > 2) _tile_stored(2, c + 2 * kTileColumns, c_stride);
  if constexpr (kTiles > 3) _tile_stored(3, c + 3 * kTileColumns, c_stride);
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

// Products of operands that are in the registers already; the FLOPs done.
static double tile_product_rounds(int64_t rounds) {
  const TileSession session;
  bf16 operand[kTileElements];
  for (int i = 0; i < kTileElements; ++i) operand[i].bits = i % 2 == 0 ? 0x3f40 : 0xbf00;
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  _tile_loadd(4, operand, 64);
  _tile_loadd(5, operand, 64);
  _tile_loadd(6, operand, 64);
  _tile_loadd(7, operand, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return 4.0 * 2 * kTileRows * kTileColumns * kTileDepth * static_cast<double>(rounds);
}

}  // namespace
}  // namespace fastattn::cpu
