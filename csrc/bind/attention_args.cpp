#include "attention_args.h"

#include <cmath>
#include <cstring>

namespace fastattn::bind {
namespace {

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxOffset = int64_t{1} << 60;  // sums of positions and windows stay inside int64

// query, key and value: dtype, rank and sizes.
void set_shapes(AttentionProblem& problem, const Tensor& query, const Tensor& key,
                const Tensor* value) {
  AttentionParams& p = problem.params;
  const int64_t rank = query.dim();
  if (problem.packed ? rank != 3 : rank != 4 && rank != 5) {
    fail("query", problem.packed ? "3 dimensions (rows, heads, head_dim)" : "4 or 5 dimensions",
         shape_text(query));
  }
  problem.batch_dims = problem.packed ? 0 : static_cast<int>(rank) - 3;
  const Sizes q = query.sizes(), k = key.sizes(), v = value ? value->sizes() : k;
  if (k.size() != q.size()) fail("key", "as many dimensions as query has", shape_text(key));
  if (v.size() != q.size()) fail("value", "as many dimensions as query has", shape_text(*value));

  for (int d = 0; d < problem.batch_dims; ++d) {
    if (k[d] != q[d]) fail("key", "the batch size of query, " + got(q[d]), shape_text(key));
    if (v[d] != q[d]) fail("value", "the batch size of query, " + got(q[d]), shape_text(*value));
  }
  const int rows = problem.row_dim(), heads = problem.head_dim(),
            columns = static_cast<int>(rank) - 1;
  p.batch0 = problem.batch_dims > 0 ? q[0] : 1;
  p.batch1 = problem.batch_dims > 1 ? q[1] : 1;
  p.heads_q = q[heads], p.heads_kv = k[heads];
  p.seqlen_q = q[rows], p.seqlen_k = k[rows];
  p.head_dim = q[columns], p.head_dim_v = v[columns];
  if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) {
    fail("query", "a head_dim of 1 to 512", shape_text(query));
  }
  if (k[columns] != p.head_dim) {
    fail("key", "the head_dim of query, " + got(p.head_dim), shape_text(key));
  }
  if (p.head_dim_v < 1 || p.head_dim_v > kMaxHeadDim) {
    fail("value", "a head_dim of 1 to 512", shape_text(*value));
  }
  if (p.heads_kv == 0 ? p.heads_q != 0 : p.heads_q % p.heads_kv != 0) {
    fail("key", "a number of heads that divides query's " + got(p.heads_q),
         got(p.heads_kv) + " heads, " + shape_text(key));
  }
  if (v[heads] != p.heads_kv) {
    fail("value", "the number of heads of key, " + got(p.heads_kv), shape_text(*value));
  }
  if (v[rows] != p.seqlen_k) {
    fail("value", "the length of key, " + got(p.seqlen_k), shape_text(*value));
  }
}

// The longest of the sequences, or what bounds them where they lie on a device.
int64_t longest_sequence(const Backend& backend, const char* argument, const IndexArray& cu,
                         int64_t count, int64_t rows, const char* max_argument, int64_t given) {
  if (backend.on_device) return given >= 0 ? min_of(given, rows) : rows;
  const int64_t longest = check_cu_seqlens(argument, cu, count, rows);
  if (given >= 0 && given < longest) {
    fail(max_argument, "at least " + got(longest) + ", the longest sequence in cu_seqlens",
         got(given));
  }
  return longest;
}

}  // namespace

int64_t check_cu_seqlens(const char* argument, const IndexArray& cu, int64_t count, int64_t rows) {
  if (index_at(cu, 0) != 0) fail(argument, "0 as the first value", got(index_at(cu, 0)));
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = index_at(cu, i + 1) - index_at(cu, i);
    if (length < 0) {
      fail(argument, "values that never decrease",
           got(index_at(cu, i + 1)) + " after " + got(index_at(cu, i)));
    }
    longest = max_of(longest, length);
  }
  if (index_at(cu, count) > rows) {
    fail(argument, "a last value of at most " + got(rows) + ", the number of rows",
         got(index_at(cu, count)));
  }
  return longest;
}

void set_packed_queries(AttentionProblem& problem, const AttentionOptions& options) {
  AttentionParams& p = problem.params;
  if (options.cu_seqlens_q->dim() != 1 || options.cu_seqlens_q->numel() < 1) {
    fail("cu_seqlens_q", "shape (sequences + 1,)", shape_text(*options.cu_seqlens_q));
  }
  p.total_q = p.seqlen_q;
  p.batch0 = options.cu_seqlens_q->numel() - 1;
  p.cu_seqlens_q = index_array(problem.held, "cu_seqlens_q", *options.cu_seqlens_q, {p.batch0 + 1});
  p.seqlen_q = longest_sequence(problem.backend, "cu_seqlens_q", p.cu_seqlens_q, p.batch0,
                                p.total_q, "max_seqlen_q", options.max_seqlen_q);
}

namespace {

void set_packed(AttentionProblem& problem, const AttentionOptions& options) {
  if (!problem.packed) return;
  AttentionParams& p = problem.params;
  if (!options.cu_seqlens_q) fail("cu_seqlens_q", "a tensor beside cu_seqlens_k", "None");
  if (!options.cu_seqlens_k) fail("cu_seqlens_k", "a tensor beside cu_seqlens_q", "None");
  set_packed_queries(problem, options);
  p.total_k = p.seqlen_k;
  p.cu_seqlens_k = index_array(problem.held, "cu_seqlens_k", *options.cu_seqlens_k, {p.batch0 + 1});
  p.seqlen_k = longest_sequence(problem.backend, "cu_seqlens_k", p.cu_seqlens_k, p.batch0,
                                p.total_k, "max_seqlen_k", options.max_seqlen_k);
}

}  // namespace

IndexArray sequence_lengths(AttentionProblem& problem, const char* argument,
                            const OptionalTensor& lengths, const IndexArray& cu, int64_t rows) {
  if (!lengths) return {};
  const AttentionParams& p = problem.params;
  const int64_t batch[2] = {p.batch0, p.batch1};
  const IndexArray array =
      index_array(problem.held, argument, *lengths, Sizes(batch, problem.batch_dims > 1 ? 2 : 1));
  const int64_t readable = problem.backend.on_device ? 0 : p.batch0 * p.batch1;
  for (int64_t b = 0; b < readable; ++b) {
    const int64_t limit = problem.packed ? index_at(cu, b + 1) - index_at(cu, b) : rows;
    const int64_t length = index_at(array, b);
    if (length < 0 || length > limit) {
      fail(argument, "values from 0 to " + got(limit), got(length) + " for sequence " + got(b));
    }
  }
  return array;
}

namespace {

// A tensor that is read at every score: each dimension is 1 or the full size. In packed form the
// last two are the largest lengths, and more than that is allowed.
void require_score_shape(const AttentionProblem& problem, const char* argument,
                         const Tensor& tensor) {
  const AttentionParams& p = problem.params;
  const int64_t full[5] = {p.batch0, p.batch1, p.heads_q, p.seqlen_q, p.seqlen_k};
  const bool two_batches = problem.batch_dims == 2;
  const Sizes sizes = tensor.sizes();
  const int rank = static_cast<int>(sizes.size());
  bool fits = rank <= (two_batches ? 5 : 4);
  for (int d = 1; fits && d <= rank; ++d) {
    const int64_t expected = full[d == 4 && !two_batches ? 0 : 5 - d], size = sizes[rank - d];
    fits = size == 1 || size == expected || (problem.packed && d <= 2 && size > expected);
  }
  if (fits) return;
  const int64_t without_batch1[4] = {full[0], full[2], full[3], full[4]};
  std::string expected = "a shape that broadcasts to " +
                         text_of(two_batches ? Sizes(full, 5) : Sizes(without_batch1, 4));
  if (problem.packed && problem.backend.on_device) {
    expected += " (max_seqlen_q and max_seqlen_k bound the lengths, which are on the device)";
  }
  fail(argument, expected, shape_text(tensor));
}

void set_score_terms(AttentionProblem& problem, const AttentionOptions& options) {
  AttentionParams& p = problem.params;
  if (options.mask) {
    require_score_shape(problem, "mask", *options.mask);
    p.mask = problem.score_view<ConstTensor>(*options.mask);
  }
  if (options.bias) {
    require_score_shape(problem, "bias", *options.bias);
    p.bias = problem.score_view<ConstTensor>(*options.bias);
  }
  if (options.alibi_slopes) {
    const Tensor& slopes = *options.alibi_slopes;
    const Sizes sizes = slopes.sizes(), strides = slopes.strides();
    const int64_t full[3] = {p.batch0, p.batch1, p.heads_q};
    const int rank = static_cast<int>(sizes.size());
    bool fits = rank >= 1 && rank <= (problem.batch_dims == 2 ? 3 : 2);
    p.alibi_slopes.data = slopes.data_ptr();
    for (int d = 1; fits && d <= rank; ++d) {
      const int to = d == 2 && problem.batch_dims < 2 ? 0 : 3 - d;
      fits = sizes[rank - d] == full[to] || (d > 1 && sizes[rank - d] == 1);
      p.alibi_slopes.stride[to] = sizes[rank - d] == 1 ? 0 : strides[rank - d];
    }
    if (!fits) {
      fail("alibi_slopes", "shape (heads,) or (batch, heads) with " + got(p.heads_q) + " heads",
           shape_text(slopes));
    }
  }
  if (options.sink) {
    require_shape("sink", *options.sink, {p.heads_q});
    p.sink.data = options.sink->data_ptr();
    p.sink.stride[2] = options.sink->strides()[0];
  }
}

int64_t checked_window(const char* side, int64_t width) {
  if (width < kUnlimited) fail("window", std::string("a width >= 0 on the ") + side, got(width));
  return width > 2 * kMaxOffset ? kUnlimited : width;
}

int64_t checked_offset(const char* argument, int64_t offset) {
  if (offset < -kMaxOffset || offset > kMaxOffset) {
    fail(argument, "a position within +-2**60", got(offset));
  }
  return offset;
}

// The seed and offset of dropout: read here, or by csrc/cuda's kernels.
void set_philox(AttentionProblem& problem, const AttentionOptions& options) {
  AttentionParams& p = problem.params;
  if (!options.philox) fail("philox", "a tensor when dropout_p > 0", "None");
  const IndexArray philox = index_array(problem.held, "philox", *options.philox, {2});
  if (!philox.is_int64) fail("philox", "dtype int64", dtype_text(*options.philox));
  if (problem.backend.cuda) {
    p.philox = philox;
  } else {
    p.philox_seed = static_cast<uint64_t>(index_at(philox, 0));
    p.philox_offset = static_cast<uint64_t>(index_at(philox, 1));
  }
}

void set_scalars(AttentionProblem& problem, const AttentionOptions& options) {
  AttentionParams& p = problem.params;
  p.top_left = options.top_left;
  p.batch_invariant = options.batch_invariant;
  p.for_backward = options.for_backward;
  p.window_left = checked_window("left", options.window_left);
  p.window_right = checked_window("right", options.window_right);
  p.query_offset = checked_offset("query_offset", options.query_offset);
  p.key_offset = checked_offset("key_offset", options.key_offset);
  p.scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  if (!std::isfinite(p.scale)) fail("scale", "a finite number", std::to_string(p.scale));
  p.softcap = options.softcap.value_or(0.0);
  if (options.softcap && !(std::isfinite(p.softcap) && p.softcap > 0)) {
    fail("softcap", "a finite number > 0, or None", std::to_string(p.softcap));
  }
  p.dropout_p = options.dropout_p;
  if (!(p.dropout_p >= 0 && p.dropout_p <= 1)) {
    fail("dropout_p", "a number from 0 to 1", std::to_string(p.dropout_p));
  }
  if (p.dropout_p > 0) set_philox(problem, options);
}

void check_option_dtypes(AttentionProblem& problem, const AttentionOptions& o) {
  AttentionParams& p = problem.params;
  if (o.mask) {
    require_dtype("mask", *o.mask, aoti_torch_dtype_bool(),
                  "bool (True = attend; an additive mask is passed as bias)");
  }
  if (o.bias) p.bias_dtype = require_float("bias", *o.bias);
  const int32_t real = dtype_code(problem.real_dtype());
  const char* real_name = p.dtype == DType::kFloat64 ? "float64" : "float32";
  if (o.alibi_slopes) require_dtype("alibi_slopes", *o.alibi_slopes, real, real_name);
  if (o.sink) require_dtype("sink", *o.sink, real, real_name);
}

}  // namespace

void require_like_query(const Tensor& query, const char* argument, const Tensor& tensor) {
  require_device_of(query, argument, tensor);
  if (dtype_code(tensor) != dtype_code(query)) {
    fail(argument, dtype_text(query) + " like query", dtype_text(tensor));
  }
}

void require_devices_of(const Tensor& query, const AttentionOptions& o) {
  const std::pair<const char*, const OptionalTensor&> optionals[] = {
      {"mask", o.mask},
      {"bias", o.bias},
      {"alibi_slopes", o.alibi_slopes},
      {"sink", o.sink},
      {"query_lengths", o.query_lengths},
      {"key_lengths", o.key_lengths},
      {"cu_seqlens_q", o.cu_seqlens_q},
      {"cu_seqlens_k", o.cu_seqlens_k},
      {"philox", o.philox},
  };
  for (const auto& [argument, tensor] : optionals) {
    if (tensor) require_device_of(query, argument, *tensor);
  }
}

void set_options(AttentionProblem& problem, const AttentionOptions& options) {
  check_option_dtypes(problem, options);
  set_score_terms(problem, options);
  set_scalars(problem, options);
}

AttentionOptions pop_options(Stack& stack) {
  AttentionOptions options;
  options.mask = stack.pop<OptionalTensor>();
  options.bias = stack.pop<OptionalTensor>();
  options.alibi_slopes = stack.pop<OptionalTensor>();
  options.sink = stack.pop<OptionalTensor>();
  options.query_lengths = stack.pop<OptionalTensor>();
  options.key_lengths = stack.pop<OptionalTensor>();
  options.cu_seqlens_q = stack.pop<OptionalTensor>();
  options.cu_seqlens_k = stack.pop<OptionalTensor>();
  options.philox = stack.pop<OptionalTensor>();
  options.top_left = stack.pop<bool>();
  options.window_left = stack.pop<int64_t>();
  options.window_right = stack.pop<int64_t>();
  options.query_offset = stack.pop<int64_t>();
  options.key_offset = stack.pop<int64_t>();
  options.max_seqlen_q = stack.pop<int64_t>();
  options.max_seqlen_k = stack.pop<int64_t>();
  options.scale = stack.pop<std::optional<double>>();
  options.softcap = stack.pop<std::optional<double>>();
  options.dropout_p = stack.pop<double>();
  options.bshd = stack.pop<bool>();
  options.batch_invariant = stack.pop<bool>();
  options.deterministic = stack.pop<bool>();
  options.for_backward = stack.pop<bool>();
  return options;
}

AttentionProblem make_problem(const Backend& backend, const Tensor& query, const Tensor& key,
                              const Tensor* value, const AttentionOptions& options) {
  AttentionProblem problem;
  problem.backend = backend;
  AttentionParams& p = problem.params;
  problem.packed = options.cu_seqlens_q || options.cu_seqlens_k;
  problem.bshd = options.bshd;
  p.dtype = require_float("query", query);
  require_like_query(query, "key", key);
  if (value) require_like_query(query, "value", *value);
  require_devices_of(query, options);
  set_shapes(problem, query, key, value);
  require_kernels(backend, p, query, "value", value);
  set_packed(problem, options);
  p.query_lengths =
      sequence_lengths(problem, "query_lengths", options.query_lengths, p.cu_seqlens_q, p.seqlen_q);
  p.key_lengths =
      sequence_lengths(problem, "key_lengths", options.key_lengths, p.cu_seqlens_k, p.seqlen_k);
  set_options(problem, options);
  p.query = problem.view<ConstTensor>(query);
  p.key = problem.view<ConstTensor>(key);
  if (value) p.value = problem.view<ConstTensor>(*value);
  return problem;
}

std::vector<int64_t> AttentionProblem::lse_shape(const Tensor& query) const {
  const Sizes sizes = query.sizes();
  std::vector<int64_t> shape(sizes.data(), sizes.data() + batch_dims);
  shape.push_back(sizes[head_dim()]);
  shape.push_back(sizes[row_dim()]);
  return shape;
}

Tensor AttentionProblem::empty_in_order_of(const Tensor& like, int64_t columns) const {
  const int rank = static_cast<int>(like.dim());
  const Sizes sizes = like.sizes(), strides = like.strides();
  int64_t new_sizes[5], new_strides[5];
  int order[5];
  for (int d = 0; d < rank; ++d) new_sizes[d] = sizes[d], order[d] = d;
  new_sizes[rank - 1] = columns;
  const int outer = batch_dims,
            inner = batch_dims + 1;  // rows and heads, in the order of the layout
  if (!packed && sizes[outer] > 1 && sizes[inner] > 1 && strides[inner] > strides[outer]) {
    std::swap(order[outer], order[inner]);
  }
  int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    new_strides[order[i]] = stride;
    stride *= max_of<int64_t>(new_sizes[order[i]], 1);
  }
  return empty_strided(Sizes(new_sizes, rank), Sizes(new_strides, rank), dtype_code(params.dtype),
                       like);
}

void AttentionProblem::zero_unused_rows(const Tensor& tensor, const IndexArray& cu_seqlens) const {
  if (!packed || backend.cuda) return;
  const int64_t used = index_at(cu_seqlens, params.batch0);
  const size_t row_bytes = tensor.sizes()[1] * tensor.sizes()[2] * dtype_size(params.dtype);
  const size_t count = (tensor.sizes()[0] - used) * row_bytes;
  if (count > 0) std::memset(static_cast<char*>(tensor.data_ptr()) + used * row_bytes, 0, count);
}

}  // namespace fastattn::bind
