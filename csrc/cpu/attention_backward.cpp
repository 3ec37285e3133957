// Drivers of the backward pass. Every gradient is a sum over (tile, block) pairs; each driver adds
// the pairs of one accumulator in the same order (heads of the group, then tiles or blocks,
// ascending), so gradients have the same bits whichever driver runs and for any number of threads.
#include <cstring>

#include "sequences.h"
#include "workspace.h"

namespace fastattn::cpu {
namespace {

using Accumulators = AttentionKernels::Accumulators;

// Sizes of the pieces, computed once per call.
struct Sizes {
  size_t tile, block, dquery, dkey, dvalue, scratch;

  Sizes(const AttentionGradParams& g, const AttentionKernels& kernels)
      : tile(kernels.backward_tile_bytes(g)),
        block(kernels.backward_block_bytes(g)),
        dquery(kernels.dquery_bytes(g)),
        dkey(kernels.dkey_bytes(g)),
        dvalue(kernels.dvalue_bytes(g)),
        scratch(kernels.backward_scratch_bytes(g)) {}
};

class Backward {
 public:
  Backward(const AttentionGradParams& g, const Threads& threads)
      : g_(g),
        p_(g.forward),
        kernels_(attention_kernels(g.forward.dtype)),
        threads_(threads),
        sequences_(all_sequences(g.forward)),
        sizes_(g, kernels_),
        group_(p_.heads_q / p_.heads_kv) {}

  Status run() {
    const int64_t heads = static_cast<int64_t>(sequences_.size()) * p_.heads_kv;
    sink_shares_.assign(sequences_.size() * static_cast<size_t>(p_.heads_q), 0.0);
    const bool wants_rest = g_.dquery.data != nullptr || g_.dkey.data != nullptr;
    Status status = Status::kOk;
    // Splitting a head over threads costs two of the five products again.
    if (wants_rest) {
      status = heads_fill_threads(heads, threads_.count, 5.0 / 7.0) ? heads_in_private() : shared();
    }
    if (status == Status::kOk && g_.dsink.data != nullptr) {
      if (!wants_rest) status = sinks_alone();
      if (status == Status::kOk) store_sinks();
    }
    if (status == Status::kOk && g_.dbias.data != nullptr && !dbias_is_done_) status = bias();
    return status;
  }

 private:
  int64_t tiles_of(const Sequence& s) const {
    return ceil_div(s.len_q, kernels_.backward_q_tile);
  }
  int64_t blocks_of(const Sequence& s) const {
    return ceil_div(s.len_k, kernels_.backward_k_block);
  }
  Range rows_of_tile(const Sequence& s, int64_t tile) const {
    const int64_t first = tile * kernels_.backward_q_tile;
    return {first, min_of(first + kernels_.backward_q_tile, s.len_q)};
  }
  // Whether any row of the tile sees a key of the block by position.
  bool pair_is_live(const Sequence& s, int64_t tile, int64_t block) const {
    const int64_t first = block * kernels_.backward_k_block;
    const Range keys = {first, min_of(first + kernels_.backward_k_block, s.len_k)};
    return !is_empty(intersect(keys_seen_by_any(p_, s, rows_of_tile(s, tile)), keys));
  }
  int64_t most_tiles() const {
    int64_t most = 0;
    for (const Sequence& s : sequences_) most = max_of(most, tiles_of(s));
    return most;
  }
  int64_t most_blocks() const {
    int64_t most = 0;
    for (const Sequence& s : sequences_) most = max_of(most, blocks_of(s));
    return most;
  }

  // Whether every score has a bias of its own, so that its gradient is dS as it stands.
  bool bias_is_per_score() const {
    const int64_t sizes[5] = {p_.batch0, p_.batch1, p_.heads_q, p_.seqlen_q, p_.seqlen_k};
    for (int dim = 0; dim < 5; ++dim) {
      if (g_.dbias.stride[dim] == 0 && sizes[dim] != 1) return false;
    }
    return p_.cu_seqlens_q.data == nullptr;
  }
  size_t dbias_bytes() const {
    return (p_.dtype == DType::kFloat64 ? 8 : 4) *
           static_cast<size_t>(kernels_.backward_q_tile * kernels_.backward_k_block);
  }

  // Packs every tile of a head and takes its share in the sink's gradient.
  void pack_tiles(const Sequence& s, int64_t head, char* tiles) {
    double share = 0;
    for (int64_t t = 0; t < tiles_of(s); ++t) {
      char* packed = tiles + sizes_.tile * static_cast<size_t>(t);
      kernels_.backward_pack_tile(g_, s, head, t, packed);
      if (g_.dsink.data != nullptr) share += kernels_.backward_sink(g_, s, head, t, packed);
    }
    sink_shares_[static_cast<size_t>(s.index * p_.heads_q + head)] = share;
  }

  void clear_dquery(const Sequence& s, char* dquery) {
    for (int64_t t = 0; t < tiles_of(s); ++t) {
      kernels_.clear_dquery(g_, s, t, dquery + sizes_.dquery * static_cast<size_t>(t));
    }
  }
  void clear_dkey_dvalue(const Sequence& s, char* dkey, char* dvalue) {
    for (int64_t b = 0; b < blocks_of(s); ++b) {
      kernels_.clear_dkey_dvalue(g_, s, b, dkey + sizes_.dkey * static_cast<size_t>(b),
                                 dvalue + sizes_.dvalue * static_cast<size_t>(b));
    }
  }

  // Stores dquery of every row tile, also of those beyond len_q (zeros).
  void store_dquery(const Sequence& s, int64_t head, const char* dquery) {
    const int64_t stored = ceil_div(s.rows_q, kernels_.backward_q_tile);
    for (int64_t t = 0; t < stored; ++t) {
      kernels_.store_dquery(g_, s, head, t, dquery + sizes_.dquery * static_cast<size_t>(t));
    }
  }
  void store_dkey_dvalue(const Sequence& s, int64_t head_kv, const char* dkey, const char* dvalue) {
    const int64_t stored = ceil_div(s.rows_k, kernels_.backward_k_block);
    for (int64_t b = 0; b < stored; ++b) {
      kernels_.store_dkey_dvalue(g_, s, head_kv, b, dkey + sizes_.dkey * static_cast<size_t>(b),
                                 dvalue + sizes_.dvalue * static_cast<size_t>(b));
    }
  }

  // One thread does one KV head: five products per pair, dQ accumulated over blocks in memory of
  // its own.
  Status heads_in_private() {
    const size_t tiles = static_cast<size_t>(most_tiles());
    const size_t blocks = static_cast<size_t>(most_blocks());
    const size_t dkv_bytes = (sizes_.dkey + sizes_.dvalue) * blocks;
    const bool with_dbias = g_.dbias.data != nullptr && bias_is_per_score();
    const size_t worker_bytes = (sizes_.tile + sizes_.dquery) * tiles + dkv_bytes + sizes_.block +
                                sizes_.scratch + (with_dbias ? dbias_bytes() : 0);
    const int64_t count = static_cast<int64_t>(sequences_.size()) * p_.heads_kv;
    const int64_t workers = min_of(threads_.count, count);
    const Workspace workspace(worker_bytes * static_cast<size_t>(workers));
    if (workspace.data() == nullptr) return Status::kOutOfMemory;
    for_each_item(threads_, workers, count, [&](int64_t item, int64_t worker) {
      char* tile_memory = workspace.data() + worker_bytes * static_cast<size_t>(worker);
      char* dquery = tile_memory + sizes_.tile * tiles;
      char* dkey = dquery + sizes_.dquery * tiles;
      char* dvalue = dkey + sizes_.dkey * blocks;
      char* block = dvalue + sizes_.dvalue * blocks;
      char* scratch = block + sizes_.block;
      char* dbias = with_dbias ? scratch + sizes_.scratch : nullptr;
      const Sequence& s = sequences_[static_cast<size_t>(item / p_.heads_kv)];
      const int64_t head_kv = item % p_.heads_kv;
      clear_dkey_dvalue(s, dkey, dvalue);
      for (int64_t head = head_kv * group_; head < (head_kv + 1) * group_; ++head) {
        pack_tiles(s, head, tile_memory);
        clear_dquery(s, dquery);
        for (int64_t b = 0; b < blocks_of(s); ++b) {
          kernels_.backward_pack_block(g_, s, head_kv, b, block);
          for (int64_t t = 0; t < tiles_of(s); ++t) {
            if (!pair_is_live(s, t, b)) continue;
            const Accumulators into = {
                g_.dquery.data ? dquery + sizes_.dquery * static_cast<size_t>(t) : nullptr,
                g_.dkey.data ? dkey + sizes_.dkey * static_cast<size_t>(b) : nullptr,
                dvalue + sizes_.dvalue * static_cast<size_t>(b), dbias};
            if (with_dbias) std::memset(dbias, 0, dbias_bytes());
            kernels_.backward_pair(g_, s, head, t, b, tile_memory + sizes_.tile * t, block, into,
                                   scratch);
            if (with_dbias) kernels_.store_dbias(g_, s.b0, s.b1, head, t, b, dbias);
          }
        }
        if (with_dbias) clear_hidden_dbias(s, head, dbias);
        if (g_.dquery.data != nullptr) store_dquery(s, head, dquery);
      }
      if (g_.dkey.data != nullptr) store_dkey_dvalue(s, head_kv, dkey, dvalue);
    });
    dbias_is_done_ = with_dbias;
    return Status::kOk;
  }

  // Zeroes the regions of a per-score bias gradient that no pair visits.
  void clear_hidden_dbias(const Sequence& s, int64_t head, char* zeros) {
    std::memset(zeros, 0, dbias_bytes());
    for (int64_t t = 0; t < ceil_div(p_.seqlen_q, kernels_.backward_q_tile); ++t) {
      for (int64_t b = 0; b < ceil_div(p_.seqlen_k, kernels_.backward_k_block); ++b) {
        if (t < tiles_of(s) && b < blocks_of(s) && pair_is_live(s, t, b)) continue;
        kernels_.store_dbias(g_, s.b0, s.b1, head, t, b, zeros);
      }
    }
  }

  // All threads share one KV head at a time: its tiles and blocks are packed once, then dK/dV go by
  // blocks and dQ goes by tiles.
  Status shared() {
    const size_t tiles = static_cast<size_t>(most_tiles());
    const size_t blocks = static_cast<size_t>(most_blocks());
    const size_t tile_bytes = sizes_.tile * tiles * static_cast<size_t>(group_);
    const size_t block_bytes = sizes_.block * blocks;
    const size_t dkv = sizes_.dkey + sizes_.dvalue;
    const size_t worker_bytes = max_of(dkv, sizes_.dquery) + sizes_.scratch;
    const Workspace workspace(tile_bytes + block_bytes +
                              worker_bytes * static_cast<size_t>(threads_.count));
    if (workspace.data() == nullptr) return Status::kOutOfMemory;
    char* packed_tiles = workspace.data();
    char* packed_blocks = packed_tiles + tile_bytes;
    char* worker_memory = packed_blocks + block_bytes;
    for (const Sequence& s : sequences_) {
      for (int64_t head_kv = 0; head_kv < p_.heads_kv; ++head_kv) {
        for_each_item(threads_, threads_.count, group_ + blocks_of(s), [&](int64_t i, int64_t) {
          if (i < group_) {
            pack_tiles(s, head_kv * group_ + i, packed_tiles + sizes_.tile * tiles * i);
          } else {
            kernels_.backward_pack_block(g_, s, head_kv, i - group_,
                                         packed_blocks + sizes_.block * (i - group_));
          }
        });
        const SharedHead head = {&s, head_kv, packed_tiles, packed_blocks, sizes_.tile * tiles};
        if (g_.dkey.data != nullptr) shared_dkey_dvalue(head, worker_memory, worker_bytes);
        if (g_.dquery.data != nullptr) shared_dquery(head, worker_memory, worker_bytes);
      }
    }
    return Status::kOk;
  }

  struct SharedHead {
    const Sequence* sequence;
    int64_t head_kv;
    const char *packed_tiles, *packed_blocks;
    size_t tiles_stride;  // bytes from the tiles of one query head to the next
  };

  void shared_pair(const SharedHead& h, int64_t member, int64_t tile, int64_t block,
                   const Accumulators& into, char* scratch) {
    const char* tiles = h.packed_tiles + h.tiles_stride * static_cast<size_t>(member);
    kernels_.backward_pair(g_, *h.sequence, h.head_kv * group_ + member, tile, block,
                           tiles + sizes_.tile * tile, h.packed_blocks + sizes_.block * block, into,
                           scratch);
  }

  void shared_dkey_dvalue(const SharedHead& h, char* worker_memory, size_t worker_bytes) {
    const Sequence& s = *h.sequence;
    const int64_t stored = ceil_div(s.rows_k, kernels_.backward_k_block);
    for_each_item(threads_, threads_.count, stored, [&](int64_t b, int64_t worker) {
      char* dkey = worker_memory + worker_bytes * static_cast<size_t>(worker);
      char* dvalue = dkey + sizes_.dkey;
      char* scratch = dkey + worker_bytes - sizes_.scratch;
      if (b < blocks_of(s)) kernels_.clear_dkey_dvalue(g_, s, b, dkey, dvalue);
      for (int64_t member = 0; member < group_ && b < blocks_of(s); ++member) {
        for (int64_t t = 0; t < tiles_of(s); ++t) {
          if (!pair_is_live(s, t, b)) continue;
          shared_pair(h, member, t, b, {nullptr, dkey, dvalue, nullptr}, scratch);
        }
      }
      kernels_.store_dkey_dvalue(g_, s, h.head_kv, b, dkey, dvalue);
    });
  }

  void shared_dquery(const SharedHead& h, char* worker_memory, size_t worker_bytes) {
    const Sequence& s = *h.sequence;
    const int64_t stored = ceil_div(s.rows_q, kernels_.backward_q_tile);
    for_each_item(threads_, threads_.count, stored * group_, [&](int64_t i, int64_t worker) {
      char* dquery = worker_memory + worker_bytes * static_cast<size_t>(worker);
      char* scratch = dquery + worker_bytes - sizes_.scratch;
      const int64_t member = i % group_, t = stored - 1 - i / group_;
      if (t < tiles_of(s)) kernels_.clear_dquery(g_, s, t, dquery);
      for (int64_t b = 0; b < blocks_of(s) && t < tiles_of(s); ++b) {
        if (!pair_is_live(s, t, b)) continue;
        shared_pair(h, member, t, b, {dquery, nullptr, nullptr, nullptr}, scratch);
      }
      kernels_.store_dquery(g_, s, h.head_kv * group_ + member, t, dquery);
    });
  }

  Status sinks_alone() {
    const size_t bytes = sizes_.tile * static_cast<size_t>(most_tiles());
    const Workspace workspace(bytes * static_cast<size_t>(threads_.count));
    if (workspace.data() == nullptr) return Status::kOutOfMemory;
    const int64_t count = static_cast<int64_t>(sequences_.size()) * p_.heads_q;
    for_each_item(threads_, threads_.count, count, [&](int64_t i, int64_t worker) {
      pack_tiles(sequences_[static_cast<size_t>(i / p_.heads_q)], i % p_.heads_q,
                 workspace.data() + bytes * static_cast<size_t>(worker));
    });
    return Status::kOk;
  }

  void store_sinks() {
    for (int64_t head = 0; head < p_.heads_q; ++head) {
      double sum = 0;
      for (size_t b = 0; b < sequences_.size(); ++b) {
        sum += sink_shares_[b * static_cast<size_t>(p_.heads_q) + static_cast<size_t>(head)];
      }
      const int64_t at = head * g_.dsink.stride[2];
      if (p_.dtype == DType::kFloat64) {
        static_cast<double*>(g_.dsink.data)[at] = sum;
      } else {
        static_cast<float*>(g_.dsink.data)[at] = static_cast<float>(sum);
      }
    }
  }

  // The bias gradient, where it is not per score, is dS summed over every dimension along which the
  // bias was broadcast. One item owns one region of it (a tile of rows and a block of keys where
  // these are not broadcast) and visits all pairs that add to it.
  struct BiasRegion {
    int64_t b0, b1, head, tile, block;  // -1: broadcast, visit all
  };

  Status bias() {
    const auto extent = [&](int dim, int64_t size) {
      return g_.dbias.stride[dim] == 0 ? int64_t{1} : size;
    };
    const int64_t tiles = ceil_div(p_.seqlen_q, kernels_.backward_q_tile);
    const int64_t blocks = ceil_div(p_.seqlen_k, kernels_.backward_k_block);
    const int64_t extents[5] = {extent(0, p_.batch0), extent(1, p_.batch1), extent(2, p_.heads_q),
                                extent(3, tiles), extent(4, blocks)};
    int64_t count = 1;
    for (const int64_t e : extents) count *= e;
    const size_t worker_bytes = sizes_.tile + sizes_.block + sizes_.scratch + dbias_bytes();
    const Workspace workspace(worker_bytes * static_cast<size_t>(threads_.count));
    if (workspace.data() == nullptr) return Status::kOutOfMemory;
    for_each_item(threads_, threads_.count, count, [&](int64_t item, int64_t worker) {
      int64_t at[5];
      for (int dim = 4; dim >= 0; --dim) {
        at[dim] = g_.dbias.stride[dim] == 0 ? -1 : item % extents[dim];
        item /= extents[dim];
      }
      const BiasRegion region = {at[0], at[1], at[2], at[3], at[4]};
      bias_region(region, tiles, blocks, workspace.data() + worker_bytes * worker);
    });
    return Status::kOk;
  }

  void bias_region(const BiasRegion& region, int64_t tiles, int64_t blocks, char* memory) {
    char* packed_block = memory + sizes_.tile;
    char* scratch = packed_block + sizes_.block;
    char* total = scratch + sizes_.scratch;
    std::memset(total, 0, dbias_bytes());
    const auto range_of = [](int64_t at, int64_t size) {
      return at < 0 ? Range{0, size} : Range{at, at + 1};
    };
    const Range heads = range_of(region.head, p_.heads_q);
    const Range tile_range = range_of(region.tile, tiles);
    const Range block_range = range_of(region.block, blocks);
    for (const Sequence& s : sequences_) {
      if (region.b0 >= 0 && s.b0 != region.b0) continue;
      if (region.b1 >= 0 && s.b1 != region.b1) continue;
      for (int64_t head = heads.first; head < heads.last; ++head) {
        for (int64_t t = tile_range.first; t < min_of(tile_range.last, tiles_of(s)); ++t) {
          kernels_.backward_pack_tile(g_, s, head, t, memory);
          for (int64_t b = block_range.first; b < min_of(block_range.last, blocks_of(s)); ++b) {
            if (!pair_is_live(s, t, b)) continue;
            kernels_.backward_pack_block(g_, s, head / group_, b, packed_block);
            kernels_.backward_pair(g_, s, head, t, b, memory, packed_block,
                                   {nullptr, nullptr, nullptr, total}, scratch);
          }
        }
      }
    }
    kernels_.store_dbias(g_, max_of<int64_t>(region.b0, 0), max_of<int64_t>(region.b1, 0),
                         max_of<int64_t>(region.head, 0), max_of<int64_t>(region.tile, 0),
                         max_of<int64_t>(region.block, 0), total);
  }

  const AttentionGradParams& g_;
  const AttentionParams& p_;
  const AttentionKernels& kernels_;
  const Threads threads_;
  const std::vector<Sequence> sequences_;
  const Sizes sizes_;
  const int64_t group_;
  std::vector<double> sink_shares_;  // (sequences, heads_q)
  bool dbias_is_done_ = false;       // together with the other gradients
};

}  // namespace

Status attention_backward(const AttentionGradParams& g, const Threads& threads) {
  return Backward(g, threads_for(g.forward, threads)).run();
}

}  // namespace fastattn::cpu
