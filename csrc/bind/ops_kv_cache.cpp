// The ops of KV caches: torch.ops.fastattn.kv_cache_update and attention_with_cache.

#include "cached_attention.h"

namespace fastattn::bind {
namespace {

// positions holds the slot of every packed row, counted over all entries: negative is not written.
NewRows rows_by_slot(const CacheStorage& storage, const RotaryTables& tables, const Tensor& key,
                     const IndexArray& slots, const IndexArray& rope_positions) {
  NewRows result;
  if (tables.present() && rope_positions.data == nullptr) {
    fail("rope_positions", "a tensor, to rotate keys that go to slots", "None");
  }
  for (int64_t row = 0; row < key.sizes()[0]; ++row) {
    const int64_t slot = index_at(slots, row);
    if (slot < 0) continue;
    if (slot >= storage.entries * storage.rows) {
      fail("positions", "slots below " + got(storage.entries * storage.rows), got(slot));
    }
    CacheToken token{0, row, slot / storage.rows, slot % storage.rows, 0};
    if (tables.present()) {
      token.position = index_at(rope_positions, row);
      check_table_position(tables, "rope_positions", token.position);
    }
    result.tokens.push_back(token);
  }
  return result;
}

// positions (batch, new) holds the position of every row: negative is not written.
NewRows rows_by_position(const CacheStorage& storage, const RotaryTables& tables, int64_t batch,
                         int64_t rows, const IndexArray& positions, const IndexArray& lengths,
                         const IndexArray& rope_positions) {
  NewRows result;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = lengths.data != nullptr ? index_at(lengths, b) : rows;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t position = index_at(positions, b * rows + row);
      if (position < 0) continue;
      if (position >= storage.capacity()) {
        fail("positions", "values below the capacity, " + got(storage.capacity()), got(position));
      }
      if (storage.paged) storage.check_page(b, position / storage.rows);
      CacheToken token{b, row, 0, 0, position};
      if (rope_positions.data != nullptr) token.position = index_at(rope_positions, b * rows + row);
      if (tables.present()) {
        const char* argument = rope_positions.data != nullptr ? "rope_positions" : "positions";
        check_table_position(tables, argument, token.position);
      }
      storage.locate(b, position, &token);
      result.tokens.push_back(token);
    }
  }
  return result;
}

IndexArray row_counts(std::vector<Tensor>& held, const OptionalTensor& lengths, int64_t batch,
                      int64_t rows) {
  if (!lengths) return {};
  const IndexArray array = index_array(held, "lengths", *lengths, {batch});
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = index_at(array, b);
    if (length < 0 || length > rows) {
      fail("lengths", "values from 0 to " + got(rows), got(length) + " for sequence " + got(b));
    }
  }
  return array;
}

struct UpdateArguments {
  Tensor key, value, positions;
  OptionalTensor lengths, cu_seqlens, rope_positions;
  bool bshd;
};

NewRows packed_rows(CacheStorage& storage, const RotaryTables& tables, const UpdateArguments& a) {
  if (a.lengths) fail("lengths", "None beside packed rows", "a tensor");
  const int64_t rows = a.key.sizes()[0];
  if (!a.cu_seqlens) {
    if (storage.paged) fail("block_table", "None where positions are slots", "a tensor");
    if (storage.ring) fail("ring", "False where positions are slots", "True");
    const IndexArray slots = index_array(storage.held, "positions", a.positions, {rows});
    IndexArray rope_positions{};
    if (a.rope_positions) {
      rope_positions = index_array(storage.held, "rope_positions", *a.rope_positions, {rows});
    }
    return rows_by_slot(storage, tables, a.key, slots, rope_positions);
  }
  if (a.rope_positions) fail("rope_positions", "None beside cu_seqlens", "a tensor");
  if (a.cu_seqlens->dim() != 1 || a.cu_seqlens->numel() < 1) {
    fail("cu_seqlens", "shape (sequences + 1,)", shape_text(*a.cu_seqlens));
  }
  const int64_t batch = a.cu_seqlens->numel() - 1;
  require_batch(storage, "cu_seqlens", batch);
  RowsByStart by_start{"positions", true, {}, {}, {}, {}, batch, 0};
  by_start.cu_seqlens = index_array(storage.held, "cu_seqlens", *a.cu_seqlens, {batch + 1});
  check_cu_seqlens("cu_seqlens", by_start.cu_seqlens, batch, rows);
  by_start.starts = index_array(storage.held, "positions", a.positions, {batch});
  return rows_by_start(storage, tables, by_start);
}

NewRows dense_rows(CacheStorage& storage, const RotaryTables& tables, const UpdateArguments& a) {
  if (a.cu_seqlens) fail("cu_seqlens", "None beside a key of 4 dimensions", "a tensor");
  const int64_t batch = a.key.sizes()[0], rows = a.key.sizes()[a.bshd ? 1 : 2];
  require_batch(storage, "key", batch);
  const IndexArray lengths = row_counts(storage.held, a.lengths, batch, rows);
  if (a.positions.dim() == 1) {
    if (a.rope_positions) {
      fail("rope_positions", "None beside positions of the first rows", "a tensor");
    }
    const IndexArray starts = index_array(storage.held, "positions", a.positions, {batch});
    return rows_by_start(storage, tables,
                         {"positions", false, starts, lengths, {}, {}, batch, rows});
  }
  const IndexArray positions = index_array(storage.held, "positions", a.positions, {batch, rows});
  IndexArray rope_positions{};
  if (a.rope_positions) {
    rope_positions = index_array(storage.held, "rope_positions", *a.rope_positions, {batch, rows});
  }
  return rows_by_position(storage, tables, batch, rows, positions, lengths, rope_positions);
}

// kv_cache_update(k_cache, v_cache, key, value, positions, ...) -> ()
void kv_cache_update(Stack& stack) {
  const auto k_cache = stack.pop<Tensor>();
  const auto v_cache = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const auto value = stack.pop<Tensor>();
  const auto positions = stack.pop<Tensor>();
  const auto block_table = stack.pop<OptionalTensor>();
  const auto k_scale = stack.pop<OptionalTensor>();
  const auto v_scale = stack.pop<OptionalTensor>();
  const auto lengths = stack.pop<OptionalTensor>();
  const auto cu_seqlens = stack.pop<OptionalTensor>();
  const auto cos = stack.pop<OptionalTensor>();
  const auto sin = stack.pop<OptionalTensor>();
  const auto rope_positions = stack.pop<OptionalTensor>();
  const bool interleaved = stack.pop<bool>();
  const bool ring = stack.pop<bool>();
  const bool bshd = stack.pop<bool>();

  require_float("key", key);
  const CacheTensors cache{k_cache, v_cache, block_table, k_scale, v_scale, ring, bshd};
  CacheStorage storage = check_storage(cache, "key", key);
  require_writable(cache);
  const RotaryTables tables{cos, sin, interleaved};
  check_tables(tables, "key", key, storage.head_dim);
  check_new_rows(storage, key, value, bshd);
  const std::pair<const char*, OptionalTensor> indices[] = {{"positions", positions},
                                                            {"lengths", lengths},
                                                            {"cu_seqlens", cu_seqlens},
                                                            {"rope_positions", rope_positions}};
  for (const auto& [argument, tensor] : indices) {
    if (tensor) require_device_of(key, argument, *tensor, "key");
  }
  const UpdateArguments arguments{key, value, positions, lengths, cu_seqlens, rope_positions, bshd};
  const NewRows rows = key.dim() == 3 ? packed_rows(storage, tables, arguments)
                                      : dense_rows(storage, tables, arguments);
  write_new_rows(storage, key, value, bshd, tables, rows);
}

// attention_with_cache(query, k_cache, v_cache, cache_lengths, block_table, k_scale, v_scale,
// key_starts, cos, sin, interleaved, ring, OPTIONS) -> (out, lse); attention_with_cache_ takes key
// and value after v_cache, and writes them first.
template <bool kWrites>
void attention_with_cache(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto k_cache = stack.pop<Tensor>();
  const auto v_cache = stack.pop<Tensor>();
  OptionalTensor key, value;
  if constexpr (kWrites) key = stack.pop<Tensor>(), value = stack.pop<Tensor>();
  const auto cache_lengths = stack.pop<Tensor>();
  const auto block_table = stack.pop<OptionalTensor>();
  const auto k_scale = stack.pop<OptionalTensor>();
  const auto v_scale = stack.pop<OptionalTensor>();
  const auto key_starts = stack.pop<OptionalTensor>();
  const auto cos = stack.pop<OptionalTensor>();
  const auto sin = stack.pop<OptionalTensor>();
  const bool interleaved = stack.pop<bool>();
  const bool ring = stack.pop<bool>();
  const AttentionOptions options = pop_options(stack);

  const CacheTensors cache{k_cache, v_cache, block_table, k_scale, v_scale, ring, options.bshd};
  const RotaryTables tables{cos, sin, interleaved};
  CachedAttention attention(query, cache, cache_lengths, key_starts, tables, options,
                            key ? &*key : nullptr, value ? &*value : nullptr);
  const auto [out, lse] = attention.run();
  stack.push(out);
  stack.push(lse);
}

#define FASTATTN_CACHE_OPTIONS                                                            \
  "Tensor? key_starts=None, Tensor? cos=None, Tensor? sin=None, bool interleaved=False, " \
  "bool ring=False, " FASTATTN_ATTENTION_OPTIONS ") -> (Tensor out, Tensor lse)"

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def(
      "kv_cache_update(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor key, Tensor value, "
      "Tensor positions, Tensor? block_table=None, Tensor(c!)? k_scale=None, "
      "Tensor(d!)? v_scale=None, Tensor? lengths=None, Tensor? cu_seqlens=None, "
      "Tensor? cos=None, Tensor? sin=None, Tensor? rope_positions=None, bool interleaved=False, "
      "bool ring=False, bool bshd=False) -> ()");
  m.def(
      "attention_with_cache(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, "
      "Tensor? block_table=None, Tensor? k_scale=None, Tensor? "
      "v_scale=None, " FASTATTN_CACHE_OPTIONS);
  m.def(
      "attention_with_cache_(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor key, "
      "Tensor value, Tensor cache_lengths, Tensor? block_table=None, Tensor(c!)? k_scale=None, "
      "Tensor(d!)? v_scale=None, " FASTATTN_CACHE_OPTIONS);
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("kv_cache_update", boxed<kv_cache_update>);
  m.impl("attention_with_cache", boxed<attention_with_cache<false>>);
  m.impl("attention_with_cache_", boxed<attention_with_cache<true>>);
}

#ifdef FASTATTN_ON_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_with_cache", boxed<attention_with_cache<false>>);
  m.impl("attention_with_cache_", boxed<attention_with_cache<true>>);
}
#endif

}  // namespace
}  // namespace fastattn::bind
