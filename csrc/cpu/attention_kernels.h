// The attention functions that each level exports, and the geometry that drivers and kernels share.
#pragma once

#include <fastattn/api.h>
#include <fastattn/sequence.h>

namespace fastattn::cpu {

// Pointers to what one level offers for one dtype. A "tile" is up to q_tile query rows of one head,
// a "block" is up to k_block keys of one KV head; both are counted from row 0 of the sequence.
struct AttentionKernels {
  // Forward: every block of a KV head is packed once, then shared by all its tiles.
  // q_tile is a multiple of q_tile_least by a power of two, and a tile may be any in between.
  int64_t q_tile, q_tile_least, k_block;
  size_t (*packed_block_bytes)(const AttentionParams&);
  size_t (*forward_scratch_bytes)(const AttentionParams&);
  // packed_blocks begins with the block of Sequence::first_seen.
  void (*pack_block)(const AttentionParams&, const Sequence&, int64_t head_kv, int64_t block,
                     void* packed);
  // `tile`: rows of the sequence, and perhaps some beyond its end.
  void (*forward_tile)(const AttentionParams&, const Sequence&, int64_t head, Range tile,
                       const char* packed_blocks, void* scratch);

  // Decode: all query rows of a KV head in one pass over a chunk of its keys, read where they lie.
  int64_t decode_max_rows, decode_max_rows_far, decode_chunk;
  size_t (*decode_partial_bytes)(const AttentionParams&);
  size_t (*decode_scratch_bytes)(const AttentionParams&);
  void (*decode_chunk_partial)(const AttentionParams&, const Sequence&, int64_t head_kv,
                               int64_t chunk, void* partial, void* scratch);
  // The partials of consecutive chunks.
  void (*decode_merge)(const AttentionParams&, const Sequence&, int64_t head_kv, int64_t num_chunks,
                       void* partials);

  // Backward: a (tile, block) pair adds its share to fp32 accumulators. Any of the accumulators may
  // be absent.
  int64_t backward_q_tile, backward_k_block;
  struct Accumulators {
    void* dquery;  // of the tile
    void* dkey;    // of the block
    void* dvalue;
    void* dbias;  // (backward_q_tile, backward_k_block) real, row-major
  };
  size_t (*backward_tile_bytes)(const AttentionGradParams&);
  size_t (*backward_block_bytes)(const AttentionGradParams&);
  size_t (*dquery_bytes)(const AttentionGradParams&);  // per tile
  size_t (*dkey_bytes)(const AttentionGradParams&);    // per block
  size_t (*dvalue_bytes)(const AttentionGradParams&);
  size_t (*backward_scratch_bytes)(const AttentionGradParams&);
  // Zeroes of an accumulator what belongs to rows of the sequence.
  void (*clear_dquery)(const AttentionGradParams&, const Sequence&, int64_t tile, void* dquery);
  void (*clear_dkey_dvalue)(const AttentionGradParams&, const Sequence&, int64_t block, void* dkey,
                            void* dvalue);
  void (*backward_pack_tile)(const AttentionGradParams&, const Sequence&, int64_t head,
                             int64_t tile, void* packed);
  void (*backward_pack_block)(const AttentionGradParams&, const Sequence&, int64_t head_kv,
                              int64_t block, void* packed);
  void (*backward_pair)(const AttentionGradParams&, const Sequence&, int64_t head, int64_t tile,
                        int64_t block, const void* packed_tile, const void* packed_block,
                        const Accumulators& accumulators, void* scratch);
  double (*backward_sink)(const AttentionGradParams&, const Sequence&, int64_t head, int64_t tile,
                          const void* packed_tile);
  void (*store_dquery)(const AttentionGradParams&, const Sequence&, int64_t head, int64_t tile,
                       const void* accumulator);
  void (*store_dkey_dvalue)(const AttentionGradParams&, const Sequence&, int64_t head_kv,
                            int64_t block, const void* dkey, const void* dvalue);
  void (*store_dbias)(const AttentionGradParams&, int64_t b0, int64_t b1, int64_t head,
                      int64_t tile, int64_t block, void* accumulator);

  // Probabilities of chosen rows, of which up to weights_q_tile share packed keys, or summed over
  // all rows for one block of keys.
  int64_t weights_q_tile, weights_k_block;
  size_t (*weights_scratch_bytes)(const AttentionParams&);
  void (*weights_rows)(const AttentionWeightsParams&, const Sequence&, int64_t head_slot,
                       int64_t first_slot, int64_t last_slot, void* scratch);
  void (*column_sums_block)(const AttentionWeightsParams&, const Sequence&, int64_t head,
                            int64_t block, void* scratch);

  // Rounds of the products of this dtype, or of e^x, on registers; the FLOPs, or exponentials,
  // done.
  double (*peak_products)(int64_t rounds);
  double (*peak_exponentials)(int64_t rounds);
};

// Each isa_<level>_attention.cpp defines its table as a constant.
struct AttentionTable {
  AttentionKernels f32, bf16, f16;
};

extern const AttentionTable kScalarAttention;
extern const AttentionKernels kScalarAttentionF64;
#if defined(__x86_64__)
extern const AttentionTable kAvx2Attention;
extern const AttentionTable kAvx512Attention;
extern const AttentionKernels kDotAttentionBf16, kAmxAttentionBf16;
#endif

// The table for this dtype at the active level (float64: always scalar).
const AttentionKernels& attention_kernels(DType dtype);

}  // namespace fastattn::cpu
