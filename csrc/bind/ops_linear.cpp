// The op of linear layers with few rows: torch.ops.fastattn.linear.

#include "fastattn/api.h"
#include "status.h"
#include "tensor_args.h"
#include "threads.h"

namespace fastattn::bind {
namespace {

DType require_16_bits(const Tensor& input) {
  const std::optional<DType> dtype = float_dtype(input);
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    fail("input", "dtype bfloat16 or float16", dtype_text(input));
  }
  return *dtype;
}

// The rows of (*, in_features), wherever the leading dimensions put them.
void set_rows(LinearParams& p, const Tensor& input) {
  const Sizes sizes = input.sizes(), strides = input.strides();
  if (sizes.size() < 1) fail("input", "at least 1 dimension (*, in_features)", shape_text(input));
  const size_t last = sizes.size() - 1;
  p.in_features = sizes[last];
  p.x_stride = strides[last];
  p.rows = 1;
  for (size_t d = 0; d < last; ++d) p.rows *= sizes[d];
  if (p.rows > kLinearRows) {
    fail("input", "at most " + std::to_string(kLinearRows) + " rows", shape_text(input));
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    int64_t offset = 0, rest = row;
    for (size_t d = last; d-- > 0; rest /= sizes[d]) offset += rest % sizes[d] * strides[d];
    p.x[row] = static_cast<const char*>(input.data_ptr()) + 2 * offset;
  }
}

void set_weight(LinearParams& p, const Tensor& input, const Tensor& weight) {
  require_device_of(input, "weight", weight, "input");
  if (float_dtype(weight) != p.dtype) fail("weight", "dtype of input", dtype_text(weight));
  const Sizes sizes = weight.sizes(), strides = weight.strides();
  if (sizes.size() != 2 || sizes[1] != p.in_features) {
    fail("weight", "shape (out_features, " + std::to_string(p.in_features) + ")",
         shape_text(weight));
  }
  p.out_features = sizes[0];
  p.weight = weight.data_ptr();
  p.weight_stride[0] = strides[0];
  p.weight_stride[1] = strides[1];
  if (strides[1] == 1 || sizes[1] <= 1) {
    p.weight_stride[1] = 1;
  } else if (strides[0] == 1 || sizes[0] <= 1) {
    p.weight_stride[0] = 1;
  } else {
    fail("weight", "contiguous rows or columns", "strides " + text_of(strides));
  }
}

// linear(input, weight, bias) -> out
void linear(Stack& stack) {
  const auto input = stack.pop<Tensor>();
  const auto weight = stack.pop<Tensor>();
  auto bias = stack.pop<OptionalTensor>();

  LinearParams p = {};
  p.dtype = require_16_bits(input);
  set_rows(p, input);
  set_weight(p, input, weight);
  if (bias) {
    require_device_of(input, "bias", *bias, "input");
    p.bias_dtype = require_float("bias", *bias);
    require_shape("bias", *bias, {p.out_features});
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    p.bias = bias->data_ptr();
  }
  const Sizes given = input.sizes();
  std::vector<int64_t> sizes(given.begin(), given.end());
  sizes.back() = p.out_features;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d-- > 0;) {
    strides[d] = strides[d + 1] * max_of<int64_t>(sizes[d + 1], 1);
  }
  Tensor out = empty_strided({sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                             dtype_code(input), input);
  p.out = out.data_ptr();
  check_status(cpu::linear(p, torch_threads()));
  stack.push(out);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("linear", boxed<linear>);
}

}  // namespace
}  // namespace fastattn::bind
