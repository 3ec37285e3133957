// The ops of KV caches: torch.ops.fastattn.kv_cache_update and attention_with_cache.

#include "cached_attention.h"

namespace fastattn::bind {
namespace {

// Of PositionsOf::kSlots, checked.
CacheTokens tokens_of_slots(const CacheStorage& storage, const RotaryTables& tables,
                            const NewRows& rows) {
  CacheTokens result;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t slot = index_at(rows.positions, row);
    if (slot < 0) continue;
    if (slot >= storage.entries * storage.rows) {
      fail("positions", "slots below " + got(storage.entries * storage.rows), got(slot));
    }
    CacheToken token{0, row, slot / storage.rows, slot % storage.rows, 0};
    if (tables.present()) {
      token.position = index_at(rows.rope_positions, row);
      check_table_position(tables, "rope_positions", token.position);
    }
    result.tokens.push_back(token);
  }
  return result;
}

// Of PositionsOf::kRows, checked.
CacheTokens tokens_of_rows(const CacheStorage& storage, const RotaryTables& tables,
                           const NewRows& rows) {
  CacheTokens result;
  const bool turned_apart = rows.rope_positions.data != nullptr;
  for (int64_t b = 0; b < rows.batch; ++b) {
    const int64_t count = rows.lengths.data != nullptr ? index_at(rows.lengths, b) : rows.rows;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t i = b * rows.rows + row, position = index_at(rows.positions, i);
      if (position < 0) continue;
      if (position >= storage.capacity()) {
        fail("positions", "values below the capacity, " + got(storage.capacity()), got(position));
      }
      if (storage.paged) storage.check_page(b, position / storage.rows);
      CacheToken token{b, row, 0, 0, position};
      if (turned_apart) token.position = index_at(rows.rope_positions, i);
      if (tables.present()) {
        check_table_position(tables, turned_apart ? "rope_positions" : "positions", token.position);
      }
      storage.locate(b, position, &token);
      result.tokens.push_back(token);
    }
  }
  return result;
}

struct UpdateArguments {
  Tensor key, value, positions;
  OptionalTensor lengths, cu_seqlens, rope_positions;
  bool bshd;
};

// Where the rows go. What the arrays hold is checked by the functions for tokens.
NewRows packed_rows(CacheStorage& storage, const RotaryTables& tables, const UpdateArguments& a) {
  if (a.lengths) fail("lengths", "None beside packed rows", "a tensor");
  NewRows result{};
  result.rows = a.key.sizes()[0];
  if (!a.cu_seqlens) {
    if (storage.paged) fail("block_table", "None where positions are slots", "a tensor");
    if (storage.ring) fail("ring", "False where positions are slots", "True");
    if (tables.present() && !a.rope_positions) {
      fail("rope_positions", "a tensor, to rotate keys that go to slots", "None");
    }
    result.positions_of = PositionsOf::kSlots;
    result.batch = 1;
    result.positions = index_array(storage.held, "positions", a.positions, {result.rows});
    if (a.rope_positions) {
      result.rope_positions =
          index_array(storage.held, "rope_positions", *a.rope_positions, {result.rows});
    }
    return result;
  }
  if (a.rope_positions) fail("rope_positions", "None beside cu_seqlens", "a tensor");
  if (a.cu_seqlens->dim() != 1 || a.cu_seqlens->numel() < 1) {
    fail("cu_seqlens", "shape (sequences + 1,)", shape_text(*a.cu_seqlens));
  }
  result.positions_of = PositionsOf::kSequences;
  result.batch = a.cu_seqlens->numel() - 1;
  require_batch(storage, "cu_seqlens", result.batch);
  result.cu_seqlens = index_array(storage.held, "cu_seqlens", *a.cu_seqlens, {result.batch + 1});
  result.positions = index_array(storage.held, "positions", a.positions, {result.batch});
  return result;
}

NewRows dense_rows(CacheStorage& storage, const UpdateArguments& a) {
  if (a.cu_seqlens) fail("cu_seqlens", "None beside a key of 4 dimensions", "a tensor");
  NewRows result{};
  result.batch = a.key.sizes()[0], result.rows = a.key.sizes()[a.bshd ? 1 : 2];
  require_batch(storage, "key", result.batch);
  if (a.lengths) {
    result.lengths = index_array(storage.held, "lengths", *a.lengths, {result.batch});
  }
  const bool by_row = a.positions.dim() != 1;
  if (!by_row && a.rope_positions) {
    fail("rope_positions", "None beside positions of the first rows", "a tensor");
  }
  result.positions_of = by_row ? PositionsOf::kRows : PositionsOf::kSequences;
  const int64_t shape[2] = {result.batch, result.rows};
  const Sizes sizes(shape, by_row ? 2 : 1);
  result.positions = index_array(storage.held, "positions", a.positions, sizes);
  if (a.rope_positions) {
    result.rope_positions = index_array(storage.held, "rope_positions", *a.rope_positions, sizes);
  }
  return result;
}

CacheTokens checked_tokens(const CacheStorage& storage, const RotaryTables& tables,
                           const NewRows& rows) {
  const int64_t with_length = rows.lengths.data != nullptr ? rows.batch : 0;
  for (int64_t b = 0; b < with_length; ++b) {
    const int64_t length = index_at(rows.lengths, b);
    if (length < 0 || length > rows.rows) {
      fail("lengths", "values from 0 to " + got(rows.rows),
           got(length) + " for sequence " + got(b));
    }
  }
  if (rows.cu_seqlens.data != nullptr) {
    check_cu_seqlens("cu_seqlens", rows.cu_seqlens, rows.batch, rows.rows);
  }
  switch (rows.positions_of) {
    case PositionsOf::kSlots: return tokens_of_slots(storage, tables, rows);
    case PositionsOf::kRows: return tokens_of_rows(storage, tables, rows);
    default: return tokens_of_sequences(storage, tables, "positions", rows);
  }
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
  const Backend backend = backend_of(key);
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
  const NewRows rows =
      key.dim() == 3 ? packed_rows(storage, tables, arguments) : dense_rows(storage, arguments);
  require_kernels_of_dtype(backend, "key", key);
  CacheTokens tokens;
  if (!backend.on_device) tokens = checked_tokens(storage, tables, rows);
  run_cache_write(backend, write_params(storage, tables, rows, tokens, &key, &value, bshd), key);
}

enum class CacheCall { kReads, kWrites, kExplains };

// attention_with_cache(query, k_cache, v_cache, cache_lengths, block_table, k_scale, v_scale,
// key_starts, cos, sin, interleaved, ring, OPTIONS) -> (out, lse); attention_with_cache_ takes key
// and value after v_cache, and writes them first; attention_with_cache_schedule takes them too, or
// None, and gives what schedule_of says, or "none".
template <CacheCall kCall>
void attention_with_cache(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto k_cache = stack.pop<Tensor>();
  const auto v_cache = stack.pop<Tensor>();
  OptionalTensor key, value;
  if constexpr (kCall == CacheCall::kWrites) {
    key = stack.pop<Tensor>(), value = stack.pop<Tensor>();
  } else if constexpr (kCall == CacheCall::kExplains) {
    key = stack.pop<OptionalTensor>(), value = stack.pop<OptionalTensor>();
  }
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
  if constexpr (kCall == CacheCall::kExplains) {
    stack.push(attention.schedule());
  } else {
    const auto [out, lse] = attention.run();
    stack.push(out);
    stack.push(lse);
  }
}

#define FASTATTN_CACHE_OPTIONS                                                            \
  "Tensor? key_starts=None, Tensor? cos=None, Tensor? sin=None, bool interleaved=False, " \
  "bool ring=False, " FASTATTN_ATTENTION_OPTIONS ")"

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
      "v_scale=None, " FASTATTN_CACHE_OPTIONS " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_with_cache_schedule(Tensor query, Tensor k_cache, Tensor v_cache, Tensor? key, "
      "Tensor? value, Tensor cache_lengths, Tensor? block_table=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None, " FASTATTN_CACHE_OPTIONS " -> str");
  m.def(
      "attention_with_cache_(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor key, "
      "Tensor value, Tensor cache_lengths, Tensor? block_table=None, Tensor(c!)? k_scale=None, "
      "Tensor(d!)? v_scale=None, " FASTATTN_CACHE_OPTIONS " -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("kv_cache_update", boxed<kv_cache_update>);
  m.impl("attention_with_cache", boxed<attention_with_cache<CacheCall::kReads>>);
  m.impl("attention_with_cache_", boxed<attention_with_cache<CacheCall::kWrites>>);
  m.impl("attention_with_cache_schedule", boxed<attention_with_cache<CacheCall::kExplains>>);
}

#ifdef FASTATTN_ON_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("kv_cache_update", boxed<kv_cache_update>);
  m.impl("attention_with_cache", boxed<attention_with_cache<CacheCall::kReads>>);
  m.impl("attention_with_cache_", boxed<attention_with_cache<CacheCall::kWrites>>);
  m.impl("attention_with_cache_schedule", boxed<attention_with_cache<CacheCall::kExplains>>);
}
#endif

}  // namespace
}  // namespace fastattn::bind
