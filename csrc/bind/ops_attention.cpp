// The attention ops: torch.ops.fastattn.attention_*.

#include <limits>

#include "attention_args.h"
#include "fastattn/api.h"
#include "status.h"
#include "threads.h"

namespace fastattn::bind {
namespace {

// lse = -inf for the packed rows that belong to no sequence, unless the kernels have done it.
void fill_unused_lse(const AttentionProblem& problem, const Tensor& lse) {
  if (!problem.packed || problem.backend.cuda) return;
  const AttentionParams& p = problem.params;
  for (int64_t head = 0; head < p.heads_q; ++head) {
    for (int64_t row = index_at(p.cu_seqlens_q, p.batch0); row < p.total_q; ++row) {
      const int64_t i = head * p.total_q + row;
      if (p.dtype == DType::kFloat64) {
        static_cast<double*>(lse.data_ptr())[i] = -std::numeric_limits<double>::infinity();
      } else {
        static_cast<float*>(lse.data_ptr())[i] = -std::numeric_limits<float>::infinity();
      }
    }
  }
}

MutableTensor writable(const ConstTensor& tensor) {
  MutableTensor view{const_cast<void*>(tensor.data), {}};
  for (int d = 0; d < 5; ++d) view.stride[d] = tensor.stride[d];
  return view;
}

}  // namespace

std::pair<Tensor, Tensor> run_attention(AttentionProblem& problem, const Tensor& query) {
  AttentionParams& p = problem.params;
  Tensor out = problem.empty_in_order_of(query, p.head_dim_v);
  Tensor lse = empty_contiguous(problem.lse_shape(query), dtype_code(problem.real_dtype()), query);
  if (problem.has_scores()) {
    p.out = problem.view<MutableTensor>(out);
    p.lse = problem.lse_view<MutableTensor>(lse);
    run_forward(problem.backend, p, query);
    problem.zero_unused_rows(out, p.cu_seqlens_q);
    fill_unused_lse(problem, lse);
  } else {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  return {out, lse};
}

namespace {

// attention_forward(query, key, value, OPTIONS) -> (out, lse)
void attention_forward(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const auto value = stack.pop<Tensor>();
  const AttentionOptions options = pop_options(stack);
  AttentionProblem problem = make_problem(backend_of(query), query, key, &value, options);
  const auto [out, lse] = run_attention(problem, query);
  stack.push(out);
  stack.push(lse);
}

// attention_plain(query, key, value, causal, scale, bshd) -> out
//
// attention_forward for most calls of inference: a short decode step takes a few microseconds, and
// so does the dispatcher for two results and as many arguments as that has.
void attention_plain(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const auto value = stack.pop<Tensor>();
  AttentionOptions options;
  options.window_right = stack.pop<bool>() ? 0 : kUnlimited;
  options.scale = stack.pop<std::optional<double>>();
  options.bshd = stack.pop<bool>();

  AttentionProblem problem = make_problem(backend_of(query), query, key, &value, options);
  AttentionParams& p = problem.params;
  Tensor out = problem.empty_in_order_of(query, p.head_dim_v);
  if (problem.has_scores()) {
    const int64_t rows = p.batch0 * p.batch1 * p.heads_q * p.seqlen_q;
    const Scratch lse(problem.backend, rows * dtype_size(problem.real_dtype()), query);
    p.out = problem.view<MutableTensor>(out);
    p.lse = {lse.data(),
             {p.batch1 * p.heads_q * p.seqlen_q, p.heads_q * p.seqlen_q, p.seqlen_q, 1, 0}};
    run_forward(problem.backend, p, query);
  } else {
    torch::stable::zero_(out);
  }
  stack.push(out);
}

// What the forward pass wrote, and the gradients that arrived, fit the problem.
void check_saved(const AttentionProblem& problem, const Tensor& query, const Tensor& out,
                 const Tensor& lse, const Tensor& dout, const OptionalTensor& dlse) {
  const Sizes sizes = query.sizes();
  std::vector<int64_t> out_shape(sizes.data(), sizes.data() + sizes.size());
  out_shape.back() = problem.params.head_dim_v;
  const std::vector<int64_t> lse_shape = problem.lse_shape(query);
  const int32_t dtype = dtype_code(problem.params.dtype);
  const int32_t real = dtype_code(problem.real_dtype());
  const std::pair<const char*, const Tensor*> checked[] = {
      {"out", &out}, {"dout", &dout}, {"lse", &lse}, {"dlse", dlse ? &*dlse : nullptr}};
  for (const auto& [argument, tensor] : checked) {
    if (!tensor) continue;
    const bool per_row = tensor == &lse || (dlse && tensor == &*dlse);
    require_device_of(query, argument, *tensor);
    require_dtype(argument, *tensor, per_row ? real : dtype, per_row ? "of lse" : "of query");
    require_shape(argument, *tensor, per_row ? lse_shape : out_shape);
  }
}

// attention_backward(dout, dlse, query, key, value, out, lse, need_dquery, need_dkey_dvalue,
// need_dbias, need_dsink, OPTIONS) -> (dquery, dkey, dvalue, dbias, dsink), each of shape (0,)
// where it is not needed.
void attention_backward(Stack& stack) {
  const auto dout = stack.pop<Tensor>();
  const auto dlse = stack.pop<OptionalTensor>();
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const auto value = stack.pop<Tensor>();
  const auto out = stack.pop<Tensor>();
  const auto lse = stack.pop<Tensor>();
  const bool need_dquery = stack.pop<bool>();
  const bool need_dkey_dvalue = stack.pop<bool>();
  const bool need_dbias = stack.pop<bool>();
  const bool need_dsink = stack.pop<bool>();
  const AttentionOptions options = pop_options(stack);

  AttentionProblem problem = make_problem(backend_of(query), query, key, &value, options);
  AttentionParams& p = problem.params;
  check_saved(problem, query, out, lse, dout, dlse);
  if (need_dbias && !options.bias) fail("bias", "a tensor, for its gradient", "None");
  if (need_dsink && !options.sink) fail("sink", "a tensor, for its gradient", "None");

  const int32_t dtype = dtype_code(p.dtype), real = dtype_code(problem.real_dtype());
  const auto gradient_or_empty = [&](bool needed, const Tensor& like, int64_t columns) {
    return needed ? problem.empty_in_order_of(like, columns) : empty_contiguous({0}, dtype, like);
  };
  Tensor dquery = gradient_or_empty(need_dquery, query, p.head_dim);
  Tensor dkey = gradient_or_empty(need_dkey_dvalue, key, p.head_dim);
  Tensor dvalue = gradient_or_empty(need_dkey_dvalue, value, p.head_dim_v);
  Tensor dbias = need_dbias
                     ? empty_contiguous(options.bias->sizes(), dtype_code(*options.bias), query)
                     : empty_contiguous({0}, dtype, query);
  Tensor dsink = empty_contiguous({need_dsink ? p.heads_q : 0}, real, query);

  const bool has_scores = problem.has_scores();
  if (!has_scores) {
    for (Tensor* gradient : {&dquery, &dkey, &dvalue, &dsink}) torch::stable::zero_(*gradient);
  }
  if (!has_scores || problem.packed)
    torch::stable::zero_(dbias);  // packed: it may exceed a sequence
  if (has_scores) {
    AttentionGradParams gradient{};
    p.out = writable(problem.view<ConstTensor>(out));
    p.lse = writable(problem.lse_view<ConstTensor>(lse));
    gradient.forward = p;
    gradient.dout = problem.view<ConstTensor>(dout);
    if (dlse) gradient.dlse = problem.lse_view<ConstTensor>(*dlse);
    if (need_dquery) gradient.dquery = problem.view<MutableTensor>(dquery);
    if (need_dkey_dvalue) {
      gradient.dkey = problem.view<MutableTensor>(dkey);
      gradient.dvalue = problem.view<MutableTensor>(dvalue);
    }
    if (need_dbias) gradient.dbias = problem.score_view<MutableTensor>(dbias);
    if (need_dsink) gradient.dsink = {dsink.data_ptr(), {0, 0, 1, 0, 0}};
    gradient.deterministic = options.deterministic;
    run_backward(problem.backend, gradient, query);
    if (need_dquery) problem.zero_unused_rows(dquery, p.cu_seqlens_q);
    if (need_dkey_dvalue) {
      problem.zero_unused_rows(dkey, p.cu_seqlens_k);
      problem.zero_unused_rows(dvalue, p.cu_seqlens_k);
    }
  }
  for (const Tensor* gradient : {&dquery, &dkey, &dvalue, &dbias, &dsink}) stack.push(*gradient);
}

// query, key and lse of an attention whose probabilities are asked for.
AttentionProblem make_weights_problem(const Tensor& query, const Tensor& key, const Tensor& lse,
                                      const AttentionOptions& options) {
  if (options.cu_seqlens_q || options.cu_seqlens_k) {
    fail("cu_seqlens_q", "None: weights of packed sequences are not offered", "a tensor");
  }
  // Of the backends only the CPU's has kernels for it, also where attention itself is emulated.
  AttentionProblem problem = make_problem(Backend{}, query, key, nullptr, options);
  require_device_of(query, "lse", lse);
  require_dtype("lse", lse, dtype_code(problem.real_dtype()), "of attention's lse");
  require_shape("lse", lse, problem.lse_shape(query));
  problem.params.lse = writable(problem.lse_view<ConstTensor>(lse));
  return problem;
}

// int64 indices in [0, limit).
IndexArray checked_indices(AttentionProblem& problem, const char* argument, const Tensor& indices,
                           int64_t limit) {
  require_dtype(argument, indices, aoti_torch_dtype_int64(), "int64");
  if (indices.dim() != 1) fail(argument, "one dimension", shape_text(indices));
  problem.held.push_back(indices.is_contiguous() ? indices : torch::stable::contiguous(indices));
  const IndexArray array{problem.held.back().data_ptr(), true};
  for (int64_t i = 0; i < indices.numel(); ++i) {
    const int64_t index = index_at(array, i);
    if (index < 0 || index >= limit) {
      fail(argument, "indices below " + std::to_string(limit), std::to_string(index));
    }
  }
  return array;
}

std::vector<int64_t> batch_shape(const AttentionProblem& problem, const Tensor& query) {
  return {query.sizes().data(), query.sizes().data() + problem.batch_dims};
}

// attention_weights(query, key, lse, rows, heads, OPTIONS) -> (*batch, len(heads), len(rows),
// length of key)
void attention_weights(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const auto lse = stack.pop<Tensor>();
  const auto rows = stack.pop<Tensor>();
  const auto heads = stack.pop<Tensor>();
  const AttentionOptions options = pop_options(stack);

  AttentionProblem problem = make_weights_problem(query, key, lse, options);
  AttentionWeightsParams params{};
  params.rows = checked_indices(problem, "rows", rows, problem.params.seqlen_q);
  params.heads = checked_indices(problem, "heads", heads, problem.params.heads_q);
  params.num_rows = rows.numel();
  params.num_heads = heads.numel();
  params.forward = problem.params;

  std::vector<int64_t> shape = batch_shape(problem, query);
  shape.insert(shape.end(), {params.num_heads, params.num_rows, problem.params.seqlen_k});
  Tensor weights = empty_contiguous(shape, dtype_code(problem.real_dtype()), query);
  if (weights.numel() > 0) {
    params.weights = problem.score_view<MutableTensor>(weights);
    check_status(cpu::attention_weights(params, torch_threads()));
  }
  stack.push(weights);
}

// attention_column_sums(query, key, lse, OPTIONS) -> (*batch, heads, length of key)
void attention_column_sums(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const auto lse = stack.pop<Tensor>();
  const AttentionOptions options = pop_options(stack);

  AttentionProblem problem = make_weights_problem(query, key, lse, options);
  std::vector<int64_t> shape = batch_shape(problem, query);
  shape.insert(shape.end(), {problem.params.heads_q, problem.params.seqlen_k});
  Tensor sums = empty_contiguous(shape, dtype_code(problem.real_dtype()), query);
  if (problem.has_scores()) {
    AttentionWeightsParams params{};
    params.forward = problem.params;
    params.column_sums = problem.lse_view<MutableTensor>(sums);  // its last dimension is the column
    std::swap(params.column_sums.stride[3], params.column_sums.stride[4]);
    check_status(cpu::attention_weights(params, torch_threads()));
  } else {
    torch::stable::zero_(sums);
  }
  stack.push(sums);
}

// attention_schedule(query, key, value, OPTIONS) -> what schedule_of says of attention_forward, or
// "none".
void attention_schedule(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const auto value = stack.pop<Tensor>();
  const AttentionOptions options = pop_options(stack);
  const AttentionProblem problem = make_problem(backend_of(query), query, key, &value, options);
  stack.push(problem.has_scores() ? schedule_of(problem.backend, problem.params, query)
                                  : std::string("none"));
}

// attention_backward_schedule(query, key, value, need_dquery, need_dkey_dvalue, OPTIONS) -> what
// schedule_of says of attention_backward where dout lies in memory as out does, or "none".
void attention_backward_schedule(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const auto value = stack.pop<Tensor>();
  const bool need_dquery = stack.pop<bool>();
  const bool need_dkey_dvalue = stack.pop<bool>();
  const AttentionOptions options = pop_options(stack);
  AttentionProblem problem = make_problem(backend_of(query), query, key, &value, options);
  if (!problem.has_scores()) return stack.push(std::string("none"));
  const Tensor out = problem.empty_in_order_of(query, problem.params.head_dim_v);
  problem.params.out = problem.view<MutableTensor>(out);
  AttentionGradParams gradient{};
  gradient.forward = problem.params;
  gradient.dout = problem.view<ConstTensor>(out);
  // Nothing is written to: it counts which ones there are.
  if (need_dquery) gradient.dquery = writable(problem.view<ConstTensor>(query));
  if (need_dkey_dvalue) {
    gradient.dkey = writable(problem.view<ConstTensor>(key));
    gradient.dvalue = writable(problem.view<ConstTensor>(value));
  }
  gradient.deterministic = options.deterministic;
  stack.push(schedule_of(problem.backend, gradient, query));
}

#define FASTATTN_FORWARD_ARGUMENTS \
  "(Tensor query, Tensor key, Tensor value, " FASTATTN_ATTENTION_OPTIONS ")"

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def("attention_forward" FASTATTN_FORWARD_ARGUMENTS " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_plain(Tensor query, Tensor key, Tensor value, bool causal, float? scale, "
      "bool bshd) -> Tensor");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, bool need_dquery, bool need_dkey_dvalue, bool need_dbias, "
      "bool need_dsink, " FASTATTN_ATTENTION_OPTIONS
      ") "
      "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor dsink)");
  m.def(
      "attention_weights(Tensor query, Tensor key, Tensor lse, Tensor rows, Tensor "
      "heads, " FASTATTN_ATTENTION_OPTIONS ") -> Tensor");
  m.def("attention_column_sums(Tensor query, Tensor key, Tensor lse, " FASTATTN_ATTENTION_OPTIONS
        ") -> Tensor");
  m.def("attention_schedule" FASTATTN_FORWARD_ARGUMENTS " -> str");
  m.def(
      "attention_backward_schedule(Tensor query, Tensor key, Tensor value, bool need_dquery, "
      "bool need_dkey_dvalue, " FASTATTN_ATTENTION_OPTIONS ") -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_forward", boxed<attention_forward>);
  m.impl("attention_plain", boxed<attention_plain>);
  m.impl("attention_backward", boxed<attention_backward>);
  m.impl("attention_weights", boxed<attention_weights>);
  m.impl("attention_column_sums", boxed<attention_column_sums>);
  m.impl("attention_schedule", boxed<attention_schedule>);
  m.impl("attention_backward_schedule", boxed<attention_backward_schedule>);
}

#ifdef FASTATTN_ON_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_forward", boxed<attention_forward>);
  m.impl("attention_plain", boxed<attention_plain>);
  m.impl("attention_backward", boxed<attention_backward>);
  m.impl("attention_schedule", boxed<attention_schedule>);
  m.impl("attention_backward_schedule", boxed<attention_backward_schedule>);
}
#endif

}  // namespace
}  // namespace fastattn::bind
