// From the dispatcher's stack to pointers and strides, over PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastattn/params.h"

namespace fastattn::bind {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Of a function of torch's C shim. (torch's own macro for it changes its name with the version.)
inline void check_torch(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call of torch's C shim failed");
}

// The arguments of a boxed op, taken in the order of its schema, and then its results.
class Stack {
 public:
  explicit Stack(StableIValue* values) : values_(values) {}

  template <typename T>
  T pop() {
    return torch::stable::detail::to<T>(values_[popped_++]);
  }

  template <typename T>
  void push(const T& value) {
    values_[pushed_++] = torch::stable::detail::from(value);
  }

 private:
  StableIValue* values_;
  int popped_ = 0, pushed_ = 0;
};

// The dispatcher's calling convention around `op`, which pops every argument before it does
// anything else (what it leaves on the stack would leak) and then pushes the results.
template <void (*op)(Stack&)>
void boxed(StableIValue* values, uint64_t /*num_arguments*/, uint64_t /*num_results*/) {
  Stack stack(values);
  op(stack);
}

// The Python layer turns this text into a TypeError where `expected` begins with "dtype", else into
// a ValueError.
[[noreturn]] inline void fail(const char* argument, const std::string& expected,
                              const std::string& got) {
  throw std::runtime_error(std::string("fastattn: ") + argument + ": expected " + expected +
                           ", got " + got);
}

inline std::string text_of(Sizes sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string shape_text(const Tensor& tensor) {
  return "shape " + text_of(tensor.sizes());
}

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  check_torch(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

inline int32_t dtype_code(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return aoti_torch_dtype_bfloat16();
    case DType::kFloat16: return aoti_torch_dtype_float16();
    case DType::kFloat64: return aoti_torch_dtype_float64();
    default: return aoti_torch_dtype_float32();
  }
}

inline std::string dtype_text(const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},     {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bool(), "bool"},           {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_int8(), "int8"},           {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},         {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const auto& [known, name] : names) {
    if (code == known) return std::string("dtype torch.") + name;
  }
  return "an unsupported dtype";
}

inline std::optional<DType> float_dtype(const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  if (code == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (code == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (code == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (code == aoti_torch_dtype_float64()) return DType::kFloat64;
  return std::nullopt;
}

inline DType require_float(const char* argument, const Tensor& tensor) {
  const std::optional<DType> dtype = float_dtype(tensor);
  if (!dtype) {
    fail(argument, "dtype float32, bfloat16, float16 or float64", dtype_text(tensor));
  }
  return *dtype;
}

inline void require_dtype(const char* argument, const Tensor& tensor, int32_t code,
                          const char* name) {
  if (dtype_code(tensor) != code) fail(argument, std::string("dtype ") + name, dtype_text(tensor));
}

inline void require_device_of(const Tensor& like, const char* argument, const Tensor& tensor,
                              const char* like_argument = "query") {
  int32_t expected = 0, given = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &expected));
  check_torch(aoti_torch_get_device_type(tensor.get(), &given));
  if (given != expected || tensor.get_device_index() != like.get_device_index()) {
    fail(argument, std::string("a tensor on the device of ") + like_argument,
         "one on another device");
  }
}

inline void require_shape(const char* argument, const Tensor& tensor, Sizes shape) {
  const Sizes sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
  if (!same) fail(argument, "shape " + text_of(shape), shape_text(tensor));
}

inline std::string got(int64_t value) {
  return std::to_string(value);
}

// An int32 or int64 tensor of the given shape; `held` keeps what it points into.
inline IndexArray index_array(std::vector<Tensor>& held, const char* argument, const Tensor& tensor,
                              Sizes shape) {
  const int32_t code = dtype_code(tensor);
  const bool is_int64 = code == aoti_torch_dtype_int64();
  if (!is_int64 && code != aoti_torch_dtype_int32()) {
    fail(argument, "dtype int32 or int64", dtype_text(tensor));
  }
  require_shape(argument, tensor, shape);
  held.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
  return {held.back().data_ptr(), is_int64};
}

inline Tensor empty_strided(Sizes sizes, Sizes strides, int32_t dtype, const Tensor& like) {
  int32_t device_type = 0, device_index = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &device_type));
  check_torch(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                       strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous(Sizes sizes, int32_t dtype, const Tensor& like) {
  constexpr size_t kMostDims = 64;  // of a tensor, as in torch's own loops
  int64_t strides[kMostDims];
  if (sizes.size() > kMostDims) throw std::runtime_error("fastattn: more than 64 dimensions");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= max_of<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
  return empty_strided(sizes, Sizes(strides, sizes.size()), dtype, like);
}

}  // namespace fastattn::bind
