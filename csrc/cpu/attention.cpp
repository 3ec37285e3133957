// Drivers of the forward pass: which schedule runs, and how its pieces are spread over threads.
#include <algorithm>
#include <span>

#include "sequences.h"
#include "workspace.h"

namespace fastattn::cpu {
namespace {

// One KV head of one sequence, with all query heads of its group.
struct HeadItem {
  const Sequence* sequence;
  int64_t head_kv;
  Range blocks;  // that some row sees
  int64_t tile_rows, tiles;
};

// Tiles for each thread, or lower ones are taken, where all threads share heads. Which rows stand
// in a tile together does not change their bits.
constexpr int64_t kTilesPerThread = 4;

int64_t tile_rows(const AttentionParams& p, std::span<const Sequence> sequences,
                  const AttentionKernels& kernels, const Threads& threads) {
  int64_t rows = kernels.q_tile;
  const auto has_few_tiles = [&] {
    int64_t tiles = 0;
    for (const Sequence& s : sequences) tiles += p.heads_q * ceil_div(s.rows_q, rows);
    return tiles < kTilesPerThread * threads.count;
  };
  while (rows > kernels.q_tile_least && has_few_tiles()) rows /= 2;
  return rows;
}

std::vector<HeadItem> head_items(const AttentionParams& p, std::span<const Sequence> sequences,
                                 const AttentionKernels& kernels, int64_t rows) {
  std::vector<HeadItem> items;
  items.reserve(sequences.size() * static_cast<size_t>(p.heads_kv));
  for (const Sequence& s : sequences) {
    const Range blocks = blocks_seen(p, s, {0, s.len_q}, kernels.k_block);
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      items.push_back({&s, h, blocks, rows, ceil_div(s.rows_q, rows)});
    }
  }
  return items;
}

int64_t most_blocks(const std::vector<HeadItem>& items) {
  int64_t most = 0;
  for (const HeadItem& item : items) most = max_of(most, item.blocks.last - item.blocks.first);
  return most;
}

// Tile t of the group's n-th query head, the last tiles first: under a causal mask they see the
// most keys.
void run_tile(const AttentionParams& p, const AttentionKernels& kernels, const HeadItem& item,
              int64_t n, const char* packed, char* scratch) {
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t first = (item.tiles - 1 - n / group) * item.tile_rows;
  kernels.forward_tile(p, *item.sequence, item.head_kv * group + n % group,
                       {first, first + item.tile_rows}, packed, scratch);
}

// Asks for the queries of the tile that run_tile begins with.
void prefetch_queries(const AttentionParams& p, const HeadItem& item) {
  const int64_t group = p.heads_q / p.heads_kv, size = static_cast<int64_t>(dtype_size(p.dtype));
  const int64_t first = (item.tiles - 1) * item.tile_rows;
  const Sequence& s = *item.sequence;
  const char* head = static_cast<const char*>(p.query.data) +
                     offset_of(p.query.stride, s.b0, s.b1, item.head_kv * group) * size;
  for (int64_t i = s.first_q + first; i < s.first_q + s.len_q; ++i) {
    const char* row = head + i * p.query.stride[3] * size;
    for (int64_t byte = 0; byte < p.head_dim * size; byte += 64)
      __builtin_prefetch(row + byte, 0, 2);
  }
}

Status forward_private(const AttentionParams& p, const AttentionKernels& kernels,
                       const std::vector<HeadItem>& items, const Threads& threads) {
  const int64_t group = p.heads_q / p.heads_kv;
  const size_t block_bytes = kernels.packed_block_bytes(p);
  const size_t packed_bytes = block_bytes * static_cast<size_t>(most_blocks(items));
  const size_t worker_bytes = packed_bytes + kernels.forward_scratch_bytes(p);
  const int64_t count = static_cast<int64_t>(items.size());
  const int64_t workers = min_of(threads.count, count);
  const Workspace workspace(worker_bytes * static_cast<size_t>(workers));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  for_each_item(threads, workers, count, [&](int64_t i, int64_t worker) {
    const HeadItem& item = items[static_cast<size_t>(i)];
    char* packed = workspace.data() + worker_bytes * static_cast<size_t>(worker);
    prefetch_queries(p, item);
    for (int64_t b = item.blocks.first; b < item.blocks.last; ++b) {
      kernels.pack_block(p, *item.sequence, item.head_kv, b,
                         packed + block_bytes * (b - item.blocks.first));
    }
    for (int64_t n = 0; n < item.tiles * group; ++n) {
      run_tile(p, kernels, item, n, packed, packed + packed_bytes);
    }
  });
  return Status::kOk;
}

// KV heads whose packed form fits this many bytes are in flight together.
constexpr size_t kSharedPackBytes = size_t{32} << 20;

Status forward_shared(const AttentionParams& p, const AttentionKernels& kernels,
                      const std::vector<HeadItem>& items, const Threads& threads) {
  const int64_t group = p.heads_q / p.heads_kv;
  const size_t block_bytes = kernels.packed_block_bytes(p);
  const size_t packed_bytes = block_bytes * static_cast<size_t>(most_blocks(items));
  const size_t scratch_bytes = kernels.forward_scratch_bytes(p);
  const size_t heads_in_flight =
      std::clamp<size_t>(kSharedPackBytes / max_of<size_t>(packed_bytes, 1), 1, items.size());
  const Workspace workspace(packed_bytes * heads_in_flight +
                            scratch_bytes * static_cast<size_t>(threads.count));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  char* scratch = workspace.data() + packed_bytes * heads_in_flight;

  for (size_t first = 0; first < items.size(); first += heads_in_flight) {
    const size_t last = min_of(first + heads_in_flight, items.size());
    struct Piece {
      const HeadItem* item;
      int64_t n;
      char* packed;
    };
    std::vector<Piece> blocks, tiles;
    for (size_t i = first; i < last; ++i) {
      char* packed = workspace.data() + packed_bytes * (i - first);
      for (int64_t b = items[i].blocks.first; b < items[i].blocks.last; ++b) {
        blocks.push_back({&items[i], b, packed});
      }
      for (int64_t n = 0; n < items[i].tiles * group; ++n) tiles.push_back({&items[i], n, packed});
    }
    for_each_item(threads, threads.count, static_cast<int64_t>(blocks.size()),
                  [&](int64_t i, int64_t) {
                    const Piece& piece = blocks[static_cast<size_t>(i)];
                    const int64_t nth = piece.n - piece.item->blocks.first;
                    kernels.pack_block(p, *piece.item->sequence, piece.item->head_kv, piece.n,
                                       piece.packed + block_bytes * nth);
                  });
    for_each_item(threads, threads.count, static_cast<int64_t>(tiles.size()),
                  [&](int64_t i, int64_t worker) {
                    const Piece& piece = tiles[static_cast<size_t>(i)];
                    run_tile(p, kernels, *piece.item, piece.n, piece.packed,
                             scratch + scratch_bytes * static_cast<size_t>(worker));
                  });
  }
  return Status::kOk;
}

// A chunk of the keys of one KV head; partials of all chunks lie side by side.
struct DecodeItem {
  const Sequence* sequence;
  int64_t head_kv, chunk, num_chunks;
  size_t partial;  // index of this chunk's partial result
};

// The chunks that hold keys seen by any row; one, with nothing to see, where there are none.
Range chunks_seen(const AttentionParams& p, const Sequence& s, int64_t chunk) {
  const Range seen = blocks_seen(p, s, {0, s.len_q}, chunk);
  return is_empty(seen) ? Range{0, 1} : seen;
}

Status forward_decode(const AttentionParams& p, const AttentionKernels& kernels,
                      std::span<const Sequence> sequences, const Threads& threads) {
  std::vector<DecodeItem> items, heads;
  for (const Sequence& s : sequences) {
    const Range chunks = chunks_seen(p, s, kernels.decode_chunk);
    const int64_t count = chunks.last - chunks.first;
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      heads.push_back({&s, h, chunks.first, count, items.size()});
      for (int64_t c = chunks.first; c < chunks.last; ++c) {
        items.push_back({&s, h, c, count, items.size()});
      }
    }
  }
  const size_t partial_bytes = kernels.decode_partial_bytes(p);
  const size_t scratch_bytes = kernels.decode_scratch_bytes(p);
  const size_t all_partials = partial_bytes * items.size();
  const Workspace workspace(all_partials + scratch_bytes * static_cast<size_t>(threads.count));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;

  const auto merge = [&](const DecodeItem& head) {
    kernels.decode_merge(p, *head.sequence, head.head_kv, head.num_chunks,
                         workspace.data() + partial_bytes * head.partial);
  };
  bool is_merged = true;
  for (const DecodeItem& head : heads) is_merged &= head.num_chunks == 1;
  for_each_item(
      threads, threads.count, static_cast<int64_t>(items.size()), [&](int64_t i, int64_t worker) {
        const DecodeItem& item = items[static_cast<size_t>(i)];
        kernels.decode_chunk_partial(
            p, *item.sequence, item.head_kv, item.chunk,
            workspace.data() + partial_bytes * item.partial,
            workspace.data() + all_partials + scratch_bytes * static_cast<size_t>(worker));
        if (is_merged) merge(item);
      });
  if (is_merged) return Status::kOk;
  for_each_item(threads, threads.count, static_cast<int64_t>(heads.size()),
                [&](int64_t i, int64_t) { merge(heads[static_cast<size_t>(i)]); });
  return Status::kOk;
}

// Few query rows for every KV head: packing K and V would cost more than it saves. With more of
// them it soon pays, if what is packed stays in the nearest caches; with some of them, where there
// are hardly more keys.
constexpr int64_t kManyRows = 16, kFewKeys = 256;
constexpr int64_t kSomeRows = 8, kKeysPerRow = 2;
constexpr int64_t kNearBytes = 3 << 20;

bool takes_decode_schedule(const AttentionParams& p, const AttentionKernels& kernels,
                           const Sequence& s) {
  const int64_t rows = p.heads_q / p.heads_kv * s.len_q;
  if (rows >= kSomeRows && s.len_k <= kKeysPerRow * rows) return false;
  if (rows > kManyRows && s.len_k <= kFewKeys) return false;
  const int64_t blocks = ceil_div(s.len_k, kernels.k_block);
  const bool is_far = static_cast<int64_t>(kernels.packed_block_bytes(p)) * blocks > kNearBytes;
  return !p.batch_invariant && !p.for_backward &&
         rows <= (is_far ? kernels.decode_max_rows_far : kernels.decode_max_rows);
}

// The sequences in the order of the batch, but those that decode first; `last` ends these.
std::vector<Sequence> decoding_first(const AttentionParams& p, const AttentionKernels& kernels,
                                     size_t* last) {
  std::vector<Sequence> sequences = all_sequences(p);
  const auto end = std::stable_partition(
      sequences.begin(), sequences.end(),
      [&](const Sequence& s) { return takes_decode_schedule(p, kernels, s); });
  *last = static_cast<size_t>(end - sequences.begin());
  return sequences;
}

}  // namespace

const char* attention_schedule(const AttentionParams& p) {
  size_t decoding = 0;
  const size_t all = decoding_first(p, attention_kernels(p.dtype), &decoding).size();
  return decoding == 0 ? "tile" : decoding == all ? "decode" : "decode and tile";
}

Status attention_forward(const AttentionParams& p, const Threads& all_threads) {
  const Threads threads = threads_for(p, all_threads);
  const AttentionKernels& kernels = attention_kernels(p.dtype);
  size_t decoding = 0;
  const std::vector<Sequence> sequences = decoding_first(p, kernels, &decoding);
  if (decoding > 0) {
    const Status status = forward_decode(p, kernels, {sequences.data(), decoding}, threads);
    if (status != Status::kOk) return status;
  }
  const std::span<const Sequence> others{sequences.data() + decoding, sequences.size() - decoding};
  const int64_t count = static_cast<int64_t>(others.size()) * p.heads_kv;
  if (count == 0) return Status::kOk;
  if (heads_fill_threads(count, threads.count, 0.85)) {
    return forward_private(p, kernels, head_items(p, others, kernels, kernels.q_tile), threads);
  }
  const int64_t rows = tile_rows(p, others, kernels, threads);
  return forward_shared(p, kernels, head_items(p, others, kernels, rows), threads);
}

Status attention_weights(const AttentionWeightsParams& w, const Threads& all_threads) {
  const AttentionParams& p = w.forward;
  const Threads threads = threads_for(p, all_threads);
  const AttentionKernels& kernels = attention_kernels(p.dtype);
  const std::vector<Sequence> sequences = all_sequences(p);
  const size_t scratch_bytes = kernels.weights_scratch_bytes(p);
  const Workspace workspace(scratch_bytes * static_cast<size_t>(threads.count));
  if (workspace.data() == nullptr) return Status::kOutOfMemory;
  const auto scratch_of = [&](int64_t worker) {
    return workspace.data() + scratch_bytes * static_cast<size_t>(worker);
  };
  const int64_t batch = static_cast<int64_t>(sequences.size());
  if (w.weights.data != nullptr) {
    const int64_t tile = kernels.weights_q_tile, tiles = ceil_div(w.num_rows, tile);
    const int64_t per_sequence = w.num_heads * tiles;
    for_each_item(threads, threads.count, batch * per_sequence, [&](int64_t i, int64_t worker) {
      const int64_t within = i % per_sequence, first = within % tiles * tile;
      kernels.weights_rows(w, sequences[static_cast<size_t>(i / per_sequence)], within / tiles,
                           first, min_of(first + tile, w.num_rows), scratch_of(worker));
    });
  } else {
    const int64_t blocks = ceil_div(p.seqlen_k, kernels.weights_k_block);
    const int64_t per_sequence = p.heads_q * blocks;
    for_each_item(threads, threads.count, batch * per_sequence, [&](int64_t i, int64_t worker) {
      const int64_t within = i % per_sequence;
      kernels.column_sums_block(w, sequences[static_cast<size_t>(i / per_sequence)],
                                within / blocks, within % blocks, scratch_of(worker));
    });
  }
  return Status::kOk;
}

}  // namespace fastattn::cpu
