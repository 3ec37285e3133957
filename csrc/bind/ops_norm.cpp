// The norm ops: torch.ops.fastattn.norm_*.

#include "backend.h"
#include "fastattn/api.h"
#include "row_args.h"
#include "status.h"
#include "threads.h"

namespace fastattn::bind {
namespace {

// What all norm ops take. `dims` trailing dimensions of input are normalised; `kind` is a NormKind.
struct NormOptions {
  OptionalTensor weight, bias;
  OptionalTensor philox;  // int64 (seed, offset), needed when dropout_p > 0
  int64_t dims = 1, kind = 0;
  double eps = 0, dropout_p = 0;
};

// Weight or bias: checked, and its elements side by side.
const void* parameter(const RowProblem& rows, const Tensor& input, const char* argument,
                      OptionalTensor& tensor, DType* dtype) {
  if (!tensor) return nullptr;
  *dtype = require_float(argument, *tensor);
  require_device_of(input, argument, *tensor, "input");
  require_shape(argument, *tensor, rows.row());
  if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
  return tensor->data_ptr();
}

DType promoted_out_dtype(const NormParams& p) {
  const bool keeps = p.kind != NormKind::kRmsLlama || p.weight == nullptr ||
                     p.weight_dtype == p.dtype || p.dtype == DType::kFloat64;
  if (keeps) return p.dtype;
  if (p.weight_dtype == DType::kFloat64) {
    fail("weight", "dtype float32, bfloat16 or float16, as casting='llama' needs with this input",
         "dtype torch.float64");
  }
  return DType::kFloat32;
}

// The seed and offset of dropout: read here, or by csrc/cuda's kernels.
void set_philox(const Backend& backend, const Tensor& input, NormOptions& options, NormParams& p) {
  if (!options.philox) fail("philox", "(seed, offset) for dropout", "None");
  require_dtype("philox", *options.philox, aoti_torch_dtype_int64(), "int64");
  require_shape("philox", *options.philox, {2});
  require_device_of(input, "philox", *options.philox, "input");
  if (!options.philox->is_contiguous()) {
    options.philox = torch::stable::contiguous(*options.philox);
  }
  const IndexArray words{options.philox->data_ptr(), true};
  if (backend.cuda) {
    p.philox = words;
  } else {
    p.philox_seed = static_cast<uint64_t>(index_at(words, 0));
    p.philox_offset = static_cast<uint64_t>(index_at(words, 1));
  }
}

// Everything but the tensors with rows. `options` is held by the caller.
NormParams make_params(const Backend& backend, const RowProblem& rows, const Tensor& input,
                       NormOptions& options) {
  NormParams p{};
  if (options.kind < 0 || options.kind > static_cast<int64_t>(NormKind::kRmsGemma)) {
    fail("kind", "a norm", std::to_string(options.kind));
  }
  p.kind = static_cast<NormKind>(options.kind);
  p.dtype = require_float("input", input);
  require_kernels_of_dtype(backend, "input", input);
  p.weight = parameter(rows, input, "weight", options.weight, &p.weight_dtype);
  p.bias = parameter(rows, input, "bias", options.bias, &p.bias_dtype);
  p.out_dtype = promoted_out_dtype(p);
  p.eps = options.eps;
  if (!(options.dropout_p >= 0 && options.dropout_p <= 1)) {
    fail("dropout_p", "a probability in [0, 1]", std::to_string(options.dropout_p));
  }
  p.dropout_p = options.dropout_p;
  if (p.dropout_p > 0) set_philox(backend, input, options, p);
  return p;
}

void require_dims(const Tensor& input, int64_t dims) {
  if (dims < 1 || dims > input.dim()) {
    fail("input", "at least the " + std::to_string(dims) + " dimensions of normalized_shape",
         shape_text(input));
  }
}

// `tensor` has the dtype and shape of input.
void require_like(const Tensor& input, const char* argument, const Tensor& tensor, DType dtype) {
  const char* names[] = {"float32", "bfloat16", "float16", "float64"};
  require_dtype(argument, tensor, dtype_code(dtype), names[static_cast<int>(dtype)]);
  require_device_of(input, argument, tensor, "input");
  require_shape(argument, tensor, input.sizes());
}

void run([[maybe_unused]] const Backend& backend, const NormParams& params,
         [[maybe_unused]] const Tensor& input) {
#ifdef FASTATTN_WITH_CUDA
  if (backend.cuda) return check_cuda_status(cuda::norm_forward(params, place_of(input)));
#endif
  check_status(cpu::norm_forward(params, torch_threads()));
}

void run([[maybe_unused]] const Backend& backend, const NormGradParams& params,
         [[maybe_unused]] const Tensor& input) {
#ifdef FASTATTN_WITH_CUDA
  if (backend.cuda) {
    const cuda::Place place = place_of(input);
    const Scratch workspace(backend, cuda::norm_backward_workspace(params, place), input);
    return check_cuda_status(cuda::norm_backward(params, workspace.data(), place));
  }
#endif
  check_status(cpu::norm_backward(params, torch_threads()));
}

struct ForwardResults {
  Tensor normalised, summed, statistics;
};

// `summed` is empty without a residual, `statistics` where they are not wanted.
ForwardResults forward(const Tensor& input, const OptionalTensor& residual, NormOptions& options,
                       bool need_statistics) {
  require_dims(input, options.dims);
  const Backend backend = backend_of(input);
  RowProblem rows(input, options.dims);
  NormParams p = make_params(backend, rows, input, options);
  if (residual) require_like(input, "residual", *residual, p.dtype);
  if (p.dropout_p > 0 && !residual) fail("residual", "a tensor, for dropout", "None");

  const int32_t dtype = dtype_code(p.dtype);
  const int32_t real = dtype_code(p.dtype == DType::kFloat64 ? p.dtype : DType::kFloat32);
  const auto absent = [&](int32_t of_dtype) { return empty_contiguous({0}, of_dtype, input); };
  ForwardResults results = {rows.empty(rows.row(), dtype_code(p.out_dtype)),
                            residual ? rows.empty(rows.row(), dtype) : Tensor(),
                            need_statistics ? rows.empty({statistics_of(p.kind)}, real) : Tensor()};
  if (rows.rows() > 0 && rows.width() > 0) {
    rows.add(input, &p.input);
    rows.add(results.normalised, &p.normalised);
    if (residual) {
      rows.add(*residual, &p.residual);
      rows.add(results.summed, &p.summed);
    }
    if (need_statistics) rows.add(results.statistics, &p.statistics);
    if (p.dropout_p > 0) rows.add_row_numbers(p.row_stride);
    rows.resolve("input", &p.shape);
    run(backend, p, input);
  } else if (need_statistics) {
    torch::stable::zero_(results.statistics);
  }
  if (need_statistics && !residual) results.summed = absent(dtype);
  return results;
}

// norm_plain(input, weight, bias, dims, kind, eps) -> normalised
//
// For inference: a short norm takes as long as the dispatcher does for results that nobody needs.
void norm_plain(Stack& stack) {
  const auto input = stack.pop<Tensor>();
  NormOptions options;
  options.weight = stack.pop<OptionalTensor>();
  options.bias = stack.pop<OptionalTensor>();
  options.dims = stack.pop<int64_t>();
  options.kind = stack.pop<int64_t>();
  options.eps = stack.pop<double>();
  stack.push(forward(input, std::nullopt, options, false).normalised);
}

// add_norm_plain(input, residual, weight, bias, dims, kind, eps) -> (normalised, summed)
void add_norm_plain(Stack& stack) {
  const auto input = stack.pop<Tensor>();
  const auto residual = stack.pop<Tensor>();
  NormOptions options;
  options.weight = stack.pop<OptionalTensor>();
  options.bias = stack.pop<OptionalTensor>();
  options.dims = stack.pop<int64_t>();
  options.kind = stack.pop<int64_t>();
  options.eps = stack.pop<double>();
  const ForwardResults results = forward(input, residual, options, false);
  stack.push(results.normalised);
  stack.push(results.summed);
}

// norm_forward(input, residual, weight, bias, philox, dims, kind, eps, dropout_p)
// -> (normalised, summed, statistics), summed of shape (0,) without a residual
void norm_forward(Stack& stack) {
  const auto input = stack.pop<Tensor>();
  const auto residual = stack.pop<OptionalTensor>();
  NormOptions options;
  options.weight = stack.pop<OptionalTensor>();
  options.bias = stack.pop<OptionalTensor>();
  options.philox = stack.pop<OptionalTensor>();
  options.dims = stack.pop<int64_t>();
  options.kind = stack.pop<int64_t>();
  options.eps = stack.pop<double>();
  options.dropout_p = stack.pop<double>();
  const ForwardResults results = forward(input, residual, options, true);
  stack.push(results.normalised);
  stack.push(results.summed);
  stack.push(results.statistics);
}

struct Needs {
  bool dresidual, dinput, dweight, dbias;
};

// The tensors that arrive and those that leave, as far as there are any.
struct GradTensors {
  const Tensor &dnormalised, &input, &statistics;
  const OptionalTensor& dsummed;
  Tensor dresidual, dinput, dweight, dbias;
};

void backward(const Backend& backend, RowProblem& rows, NormGradParams& g, GradTensors& tensors,
              const Needs& needs) {
  NormParams& p = g.forward;
  ConstRows statistics{};
  rows.add(tensors.input, &p.input);
  rows.add(tensors.statistics, &statistics);
  rows.add(tensors.dnormalised, &g.dnormalised);
  if (tensors.dsummed) rows.add(*tensors.dsummed, &g.dsummed);
  if (needs.dresidual) rows.add(tensors.dresidual, &g.dresidual);
  if (needs.dinput) {
    rows.add(tensors.dinput, &g.dinput);
    rows.add_row_numbers(p.row_stride);
  }
  rows.resolve("input", &p.shape);
  p.statistics.data = const_cast<void*>(statistics.data);
  for (int d = 0; d < kRowDims; ++d) p.statistics.stride[d] = statistics.stride[d];
  if (needs.dweight) g.dweight = tensors.dweight.data_ptr();
  if (needs.dbias) g.dbias = tensors.dbias.data_ptr();
  run(backend, g, tensors.input);
}

// norm_backward(dnormalised, dsummed, input, statistics, weight, bias, philox, dims, kind,
// dropout_p, need_dresidual, need_dinput, need_dweight, need_dbias) -> (dresidual, dinput, dweight,
// dbias), each of shape (0,) where it is not needed. `input` is what was normalised; without
// dropout, dresidual is the gradient of the input too.
void norm_backward(Stack& stack) {
  const auto dnormalised = stack.pop<Tensor>();
  const auto dsummed = stack.pop<OptionalTensor>();
  const auto input = stack.pop<Tensor>();
  const auto statistics = stack.pop<Tensor>();
  NormOptions options;
  options.weight = stack.pop<OptionalTensor>();
  options.bias = stack.pop<OptionalTensor>();
  options.philox = stack.pop<OptionalTensor>();
  options.dims = stack.pop<int64_t>();
  options.kind = stack.pop<int64_t>();
  options.dropout_p = stack.pop<double>();
  Needs needs{};
  needs.dresidual = stack.pop<bool>();
  needs.dinput = stack.pop<bool>();
  needs.dweight = stack.pop<bool>();
  needs.dbias = stack.pop<bool>();

  require_dims(input, options.dims);
  const Backend backend = backend_of(input);
  RowProblem rows(input, options.dims);
  NormGradParams g{};
  g.forward = make_params(backend, rows, input, options);
  const NormParams& p = g.forward;
  const DType real = p.dtype == DType::kFloat64 ? p.dtype : DType::kFloat32;
  require_like(input, "dnormalised", dnormalised, p.out_dtype);
  if (dsummed) require_like(input, "dsummed", *dsummed, p.dtype);
  std::vector<int64_t> shape(rows.leading().data(), rows.leading().data() + rows.leading().size());
  shape.push_back(statistics_of(p.kind));
  require_dtype("statistics", statistics, dtype_code(real), "of the accumulators");
  require_device_of(input, "statistics", statistics, "input");
  require_shape("statistics", statistics, shape);
  const Tensor adjacent = statistics.strides()[shape.size() - 1] == 1 || shape.back() == 1
                              ? statistics
                              : torch::stable::contiguous(statistics);
  if (needs.dweight && !options.weight) fail("weight", "a tensor, for its gradient", "None");
  if (needs.dbias && !options.bias) fail("bias", "a tensor, for its gradient", "None");
  if (needs.dinput && !(p.dropout_p > 0)) fail("dropout_p", "above 0, for dinput", "0");

  const int32_t dtype = dtype_code(p.dtype);
  const auto rows_or_absent = [&](bool needed) {
    return needed ? rows.empty(rows.row(), dtype) : empty_contiguous({0}, dtype, input);
  };
  const auto sum_or_absent = [&](bool needed, DType of) {
    return needed ? empty_contiguous(rows.row(), dtype_code(of), input)
                  : empty_contiguous({0}, dtype, input);
  };
  GradTensors tensors = {dnormalised,
                         input,
                         adjacent,
                         dsummed,
                         rows_or_absent(needs.dresidual),
                         rows_or_absent(needs.dinput),
                         sum_or_absent(needs.dweight, p.weight_dtype),
                         sum_or_absent(needs.dbias, p.bias_dtype)};
  const bool wanted = needs.dresidual || needs.dinput || needs.dweight || needs.dbias;
  if (rows.rows() == 0 || rows.width() == 0) {
    torch::stable::zero_(tensors.dweight);
    torch::stable::zero_(tensors.dbias);
  } else if (wanted) {
    backward(backend, rows, g, tensors, needs);
  }
  for (const Tensor* x : {&tensors.dresidual, &tensors.dinput, &tensors.dweight, &tensors.dbias}) {
    stack.push(*x);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def(
      "norm_plain(Tensor input, Tensor? weight, Tensor? bias, int dims, int kind, float eps) "
      "-> Tensor");
  m.def(
      "add_norm_plain(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, int dims, "
      "int kind, float eps) -> (Tensor normalised, Tensor summed)");
  m.def(
      "norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? philox, "
      "int dims, int kind, float eps, float dropout_p) "
      "-> (Tensor normalised, Tensor summed, Tensor statistics)");
  m.def(
      "norm_backward(Tensor dnormalised, Tensor? dsummed, Tensor input, Tensor statistics, "
      "Tensor? weight, Tensor? bias, Tensor? philox, int dims, int kind, float dropout_p, "
      "bool need_dresidual, bool need_dinput, bool need_dweight, bool need_dbias) "
      "-> (Tensor dresidual, Tensor dinput, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("norm_plain", boxed<norm_plain>);
  m.impl("add_norm_plain", boxed<add_norm_plain>);
  m.impl("norm_forward", boxed<norm_forward>);
  m.impl("norm_backward", boxed<norm_backward>);
}

#ifdef FASTATTN_ON_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("norm_plain", boxed<norm_plain>);
  m.impl("add_norm_plain", boxed<add_norm_plain>);
  m.impl("norm_forward", boxed<norm_forward>);
  m.impl("norm_backward", boxed<norm_backward>);
}
#endif

}  // namespace
}  // namespace fastattn::bind
