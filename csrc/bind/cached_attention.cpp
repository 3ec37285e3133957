#include "cached_attention.h"

#include "fastattn/api.h"
#include "status.h"
#include "threads.h"

namespace fastattn::bind {

void require_batch(const CacheStorage& storage, const char* argument, int64_t batch) {
  if (batch == storage.sequences()) return;
  fail(argument,
       got(storage.sequences()) + " sequences, as " +
           (storage.paged ? "block_table has" : "k_cache has"),
       got(batch));
}

CachedAttention::CachedAttention(const Tensor& query, const CacheTensors& cache,
                                 const Tensor& cache_lengths, const OptionalTensor& key_starts,
                                 const RotaryTables& tables, const AttentionOptions& options,
                                 const Tensor* key, const Tensor* value)
    : query_(query),
      tables_(tables),
      options_(options),
      key_(key),
      value_(value),
      p_(problem_.params) {
  p_.dtype = require_float("query", query);
  problem_.backend = backend_of(query);
  storage_ = check_storage(cache, "query", query);
  check_tables(tables, "query", query, storage_.head_dim);
  require_devices_of(query, options);
  set_shapes();
  require_kernels(problem_.backend, p_, query, "v_cache", &cache.v_cache);
  set_lengths(cache_lengths);
  set_starts(key_starts);
  refuse_options();
  set_options(problem_, options);
  set_cache();
  check_pages();
  place_queries();
  if (key == nullptr) return;
  require_writable(cache);
  if (!problem_.backend.on_device) {
    tokens_ = tokens_of_sequences(storage_, tables_, "cache_lengths", new_rows());
  }
}

std::pair<Tensor, Tensor> CachedAttention::run() {
  p_.query = problem_.view<ConstTensor>(query_);
  CacheWriteParams write =
      write_params(storage_, tables_, new_rows(), tokens_, key_, value_, options_.bshd);
  if (tables_.present()) {
    const Tensor& rotated = memory_for_rotated();
    if (problem_.backend.cuda) {  // on the way, by the launch that writes
      write.update.dtype = p_.dtype;
      write.heads_q = p_.heads_q;
      write.query = p_.query;
      write.rotated_query = problem_.view<MutableTensor>(rotated);
    } else {
      rotate_query(rotated);
    }
    p_.query = problem_.view<ConstTensor>(rotated);
  }
  if (key_ != nullptr || tables_.present()) run_cache_write(problem_.backend, write, query_);
  return run_attention(problem_, query_);
}

std::string CachedAttention::schedule() {
  if (!problem_.has_scores()) return "none";
  p_.query = problem_.view<ConstTensor>(tables_.present() ? memory_for_rotated() : query_);
  return schedule_of(problem_.backend, p_, query_);
}

const Tensor& CachedAttention::memory_for_rotated() {
  problem_.held.push_back(empty_contiguous(query_.sizes(), dtype_code(query_), query_));
  return problem_.held.back();
}

void CachedAttention::set_shapes() {
  problem_.packed = options_.cu_seqlens_q.has_value();
  problem_.bshd = options_.bshd;
  problem_.batch_dims = problem_.packed ? 0 : 1;
  if (query_.dim() != problem_.batch_dims + 3) {
    fail("query",
         problem_.packed ? "3 dimensions (rows, heads, head_dim) beside cu_seqlens_q"
                         : "4 dimensions, or 3 beside cu_seqlens_q",
         shape_text(query_));
  }
  const Sizes q = query_.sizes();
  p_.batch0 = problem_.packed ? 1 : q[0];
  p_.batch1 = 1;
  p_.heads_q = q[problem_.head_dim()], p_.heads_kv = storage_.heads;
  p_.seqlen_q = q[problem_.row_dim()];
  p_.seqlen_k = storage_.ring ? storage_.rows : storage_.capacity();
  p_.head_dim = q[problem_.batch_dims + 2], p_.head_dim_v = storage_.head_dim_v;
  if (p_.head_dim != storage_.head_dim) {
    fail("query", "the head_dim of k_cache, " + got(storage_.head_dim), shape_text(query_));
  }
  if (p_.heads_kv == 0 ? p_.heads_q != 0 : p_.heads_q % p_.heads_kv != 0) {
    fail("k_cache", "a number of heads that divides query's " + got(p_.heads_q),
         got(p_.heads_kv) + " heads");
  }
  if (problem_.packed) set_packed_queries(problem_, options_);
  require_batch(storage_, problem_.packed ? "cu_seqlens_q" : "query", p_.batch0);
  p_.query_lengths = sequence_lengths(problem_, "query_lengths", options_.query_lengths,
                                      p_.cu_seqlens_q, p_.seqlen_q);
  if (key_ == nullptr) return;
  require_like_query(query_, "key", *key_);
  check_new_rows(storage_, *key_, *value_, options_.bshd);
  const Sizes k = key_->sizes();
  if (k.size() != q.size() || k[0] != q[0]) {
    fail("key", "the dimensions of query, and as many sequences", shape_text(*key_));
  }
  if (k[problem_.row_dim()] != q[problem_.row_dim()]) {
    fail("key", "as many rows as query, " + got(q[problem_.row_dim()]), shape_text(*key_));
  }
}

void CachedAttention::set_lengths(const Tensor& cache_lengths) {
  require_device_of(query_, "cache_lengths", cache_lengths);
  p_.key_lengths = index_array(problem_.held, "cache_lengths", cache_lengths, {p_.batch0});
  if (problem_.backend.on_device) return;
  for (int64_t b = 0; b < p_.batch0; ++b) {
    const int64_t old = index_at(p_.key_lengths, b), added = key_ != nullptr ? queries_of(b) : 0;
    if (old < 0 || old > storage_.capacity() - added) {
      fail("cache_lengths",
           "values from 0 to " + got(storage_.capacity() - added) +
               (added > 0 ? ", the capacity without the " + got(added) + " new rows" : ""),
           got(old) + " for sequence " + got(b));
    }
  }
}

void CachedAttention::set_starts(const OptionalTensor& key_starts) {
  if (!key_starts) return;
  require_device_of(query_, "key_starts", *key_starts);
  p_.cache.key_starts = index_array(problem_.held, "key_starts", *key_starts, {p_.batch0});
  if (problem_.backend.on_device) return;
  for (int64_t b = 0; b < p_.batch0; ++b) {
    const int64_t start = index_at(p_.cache.key_starts, b);
    if (start < 0) fail("key_starts", "values >= 0", got(start) + " for sequence " + got(b));
  }
}

// What attention over a cache does not offer.
void CachedAttention::refuse_options() const {
  if (options_.key_lengths) fail("key_lengths", "None: cache_lengths says it", "a tensor");
  if (options_.cu_seqlens_k) fail("cu_seqlens_k", "None: keys are in the cache", "a tensor");
  if (options_.dropout_p != 0) fail("dropout_p", "0", std::to_string(options_.dropout_p));
  if (!storage_.ring) return;
  if (options_.mask) fail("mask", "None beside a ring, whose rows change places", "a tensor");
  if (options_.bias) fail("bias", "None beside a ring, whose rows change places", "a tensor");
  if (options_.window_left < 0 || options_.window_left > storage_.rows - p_.seqlen_q) {
    fail("window",
         "at most " + got(storage_.rows - p_.seqlen_q) +
             " keys on the left: what the ring keeps before " + got(p_.seqlen_q) + " queries",
         options_.window_left < 0 ? "no limit" : got(options_.window_left));
  }
}

void CachedAttention::set_cache() {
  p_.key = storage_.key, p_.value = storage_.value;
  p_.cache.block_table = storage_.block_table;
  p_.cache.entries = storage_.entries;
  p_.cache.pages_per_sequence = storage_.pages_per_sequence;
  p_.cache.page_rows = storage_.paged ? storage_.rows : 0;
  p_.cache.ring_rows = storage_.ring ? storage_.rows : 0;
  p_.cache.appended = key_ != nullptr;
  p_.cache.key_scale = storage_.key_scale, p_.cache.value_scale = storage_.value_scale;
}

// Pages that no query can see may be gone.
void CachedAttention::check_pages() const {
  if (!storage_.paged || problem_.backend.on_device) return;
  for (int64_t b = 0; b < p_.batch0; ++b) {
    const int64_t length = total_of(b);
    const IndexArray& starts = p_.cache.key_starts;
    int64_t first = starts.data != nullptr ? index_at(starts, b) : 0;
    if (p_.window_left >= 0) {
      first = max_of(first, length - queries_of(b) - min_of(p_.window_left, length));
    }
    if (first >= length) continue;
    for (int64_t page = first / storage_.rows; page <= (length - 1) / storage_.rows; ++page) {
      storage_.check_page(b, page);
    }
  }
}

void CachedAttention::place_queries() {
  if (!tables_.present() || problem_.backend.on_device) return;
  const int64_t rows = query_.sizes()[problem_.row_dim()];
  query_positions_.assign(static_cast<size_t>(problem_.packed ? rows : p_.batch0 * rows), 0);
  const IndexArray& starts = p_.cache.key_starts;
  for (int64_t b = 0; b < p_.batch0; ++b) {
    const int64_t count = queries_of(b);
    const bool padded = starts.data != nullptr;
    const int64_t first_position = total_of(b) - count - (padded ? index_at(starts, b) : 0);
    const int64_t first = problem_.packed ? index_at(p_.cu_seqlens_q, b) : b * rows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = max_of(first_position + i, padded ? 0 : first_position);
      check_table_position(tables_, "cache_lengths", position);
      query_positions_[static_cast<size_t>(first + i)] = position;
    }
  }
}

NewRows CachedAttention::new_rows() const {
  NewRows rows{};
  rows.positions_of = PositionsOf::kSequences;
  rows.positions = p_.key_lengths;
  rows.lengths = p_.query_lengths;
  rows.cu_seqlens = p_.cu_seqlens_q;
  rows.key_starts = p_.cache.key_starts;
  rows.batch = p_.batch0, rows.rows = query_.sizes()[problem_.row_dim()];
  rows.stored = key_ == nullptr;
  return rows;
}

void CachedAttention::rotate_query(const Tensor& rotated) {
  const int64_t rows = query_.sizes()[problem_.row_dim()];
  const auto set = [&](const Tensor& x, int64_t (&batch)[kRopeBatchDims], int64_t (&stride)[3]) {
    const ConstTensor view = problem_.view<ConstTensor>(x);
    batch[0] = view.stride[0];
    for (int d = 0; d < 3; ++d) stride[d] = view.stride[2 + d];
  };
  RopeParams rope{};
  rope.dtype = p_.dtype;
  rope.table_dtype = *float_dtype(*tables_.cos);
  rope.num_operands = 1;
  rope.operand[0] = {
      query_.data_ptr(), rotated.data_ptr(), p_.heads_q, p_.head_dim, {}, {}, {}, {}};
  set(query_, rope.operand[0].x_batch_stride, rope.operand[0].x_stride);
  set(rotated, rope.operand[0].out_batch_stride, rope.operand[0].out_stride);
  rope.batch_dims = problem_.batch_dims;
  rope.batch_size[0] = p_.batch0;
  rope.length = rows;
  rope.rotary_dim = 2 * tables_.cos->sizes()[1];
  rope.cos = tables_.cos->data_ptr(), rope.sin = tables_.sin->data_ptr();
  for (int d = 0; d < 2; ++d) {
    rope.cos_stride[d] = tables_.cos->strides()[d];
    rope.sin_stride[d] = tables_.sin->strides()[d];
  }
  rope.positions = {query_positions_.data(), true, {rows}, 1};
  rope.interleaved = tables_.interleaved;
  if (rotated.numel() > 0) check_status(cpu::rope(rope, torch_threads()));
}

}  // namespace fastattn::bind
