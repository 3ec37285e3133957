// The ops of activations: torch.ops.fastattn.activation* and gated_activation*.

#include <initializer_list>

#include "backend.h"
#include "dense_like.h"
#include "fastattn/api.h"
#include "status.h"
#include "threads.h"

namespace fastattn::bind {
namespace {

constexpr int kMostDims = 24;

// A tensor of the shape that is walked; strides of a broadcast dimension are 0.
struct Walked {
  ActivationView* view;
  void* data;
  int64_t stride[kMostDims];
};

// The dimensions of a shape, in the order of memory, with those merged that follow each other in
// every tensor.
class Walk {
 public:
  Walk(const char* argument, const Tensor& shape_of, Sizes sizes) : dims_(0) {
    if (sizes.size() > kMostDims) {
      fail(argument, "at most " + std::to_string(kMostDims) + " dimensions", shape_text(shape_of));
    }
    argument_ = argument;
    sizes_ = sizes;
  }

  void add(ActivationView& view, const Tensor& x, int64_t offset = 0, int64_t item = 0) {
    add(view, static_cast<char*>(x.data_ptr()) + offset * item, x.strides());
  }

  void add(ActivationView& view, void* data, Sizes strides) {
    Walked& walked = walked_[count_++];
    walked.view = &view;
    walked.data = data;
    const size_t missing = sizes_.size() - strides.size();  // leading dimensions of a bias
    for (size_t d = 0; d < sizes_.size(); ++d) {
      walked.stride[d] = d < missing ? 0 : strides[d - missing];
    }
  }

  // Fills the views. The order is that of the first tensor's memory; or `in_order`, that of the
  // dimensions, with the last one left alone.
  void finish(ActivationParams& p, bool in_order) {
    int order[kMostDims];
    for (size_t d = 0; d < sizes_.size(); ++d) {
      if (sizes_[d] == 1 && !(in_order && d + 1 == sizes_.size())) continue;
      int at = dims_++;
      order[at] = static_cast<int>(d);
      const int64_t* stride = walked_[0].stride;
      for (; !in_order && at > 0 && stride[order[at - 1]] < stride[order[at]]; --at) {
        std::swap(order[at - 1], order[at]);
      }
    }
    if (dims_ == 0) {  // one element
      set_columns(p, 1, -1);
      return;
    }
    int last = dims_ - 1;
    int64_t columns = sizes_[order[last]];
    const int inner = order[last];
    for (; !in_order && last > 0 && follows(order[last - 1], inner, columns); --last) {
      columns *= sizes_[order[last - 1]];
    }
    set_columns(p, columns, inner);
    merge_outer(p, order, last);
  }

 private:
  // Whether dimension d begins again where `size` elements of dimension `inner` end.
  bool follows(int d, int inner, int64_t size) const {
    for (int i = 0; i < count_; ++i) {
      if (walked_[i].stride[d] != walked_[i].stride[inner] * size) return false;
    }
    return true;
  }

  void set_columns(ActivationParams& p, int64_t columns, int inner) {
    p.columns = columns;
    for (int i = 0; i < count_; ++i) {
      walked_[i].view->data = walked_[i].data;
      walked_[i].view->stride = inner < 0 ? 1 : walked_[i].stride[inner];
    }
  }

  void merge_outer(ActivationParams& p, const int* order, int count) {
    int64_t sizes[kMostDims];
    int inner[kMostDims];
    int merged = 0;  // innermost first
    for (int k = count - 1; k >= 0; --k) {
      if (merged > 0 && follows(order[k], inner[merged - 1], sizes[merged - 1])) {
        sizes[merged - 1] *= sizes_[order[k]];
      } else {
        inner[merged] = order[k];
        sizes[merged++] = sizes_[order[k]];
      }
    }
    if (merged > kActivationDims) {
      fail(argument_,
           "strides that merge into at most " + std::to_string(kActivationDims + 1) + " dimensions",
           std::to_string(merged + 1));
    }
    p.outer_dims = merged;
    for (int d = 0; d < merged; ++d) {
      p.outer_size[d] = sizes[merged - 1 - d];
      for (int i = 0; i < count_; ++i) {
        walked_[i].view->outer_stride[d] = walked_[i].stride[inner[merged - 1 - d]];
      }
    }
  }

  const char* argument_;
  Sizes sizes_;
  Walked walked_[7];
  int count_ = 0, dims_;
};

Activation activation_kind(int64_t kind) {
  if (kind < 0 || kind >= kNumActivations) {
    fail("kind", "0 to " + std::to_string(kNumActivations - 1), std::to_string(kind));
  }
  return static_cast<Activation>(kind);
}

void require_like(const char* argument, const Tensor& x, const char* like_argument,
                  const Tensor& like) {
  require_device_of(like, argument, x, like_argument);
  if (dtype_code(x) != dtype_code(like)) {
    fail(argument, std::string("dtype of ") + like_argument, dtype_text(x));
  }
  require_shape(argument, x, like.sizes());
}

ActivationParams make_params(const char* argument, const Tensor& input, int64_t kind) {
  ActivationParams p{};
  p.dtype = require_float(argument, input);
  require_kernels_of_dtype(backend_of(input), argument, input);
  p.kind = activation_kind(kind);
  return p;
}

void check_bias(ActivationParams& p, const Tensor& input, const OptionalTensor& bias) {
  if (!bias) return;
  p.bias_dtype = require_float("bias", *bias);
  require_device_of(input, "bias", *bias, "input");
  if (input.dim() < 1) fail("input", "at least 1 dimension beside a bias", shape_text(input));
  const int64_t columns = input.sizes()[input.dim() - 1];
  require_shape("bias", *bias, Sizes(&columns, 1));
}

void run_forward(const ActivationParams& p, [[maybe_unused]] const Tensor& input) {
#ifdef FASTATTN_WITH_CUDA
  if (backend_of(input).cuda) {
    return check_cuda_status(cuda::activation_forward(p, place_of(input)));
  }
#endif
  check_status(cpu::activation_forward(p, torch_threads()));
}

void run_backward(const ActivationParams& p, [[maybe_unused]] const Tensor& input) {
#ifdef FASTATTN_WITH_CUDA
  if (const Backend backend = backend_of(input); backend.cuda) {
    const cuda::Place place = place_of(input);
    const Scratch workspace(backend, cuda::activation_backward_workspace(p, place), input);
    return check_cuda_status(cuda::activation_backward(p, workspace.data(), place));
  }
#endif
  check_status(cpu::activation_backward(p, torch_threads()));
}

// activation(input, bias, kind) -> out
void activation(Stack& stack) {
  const auto input = stack.pop<Tensor>();
  const auto bias = stack.pop<OptionalTensor>();
  const auto kind = stack.pop<int64_t>();

  ActivationParams p = make_params("input", input, kind);
  check_bias(p, input, bias);
  Tensor out = empty_dense_like(input);
  Walk walk("input", input, input.sizes());
  walk.add(p.out, out);
  walk.add(p.input, input);
  if (bias) walk.add(p.bias, *bias);
  walk.finish(p, false);
  run_forward(p, input);
  stack.push(out);
}

// activation_backward(dout, input, bias, kind, need_dinput, need_dbias) -> (dinput, dbias), each of
// shape (0,) where it is not needed.
void activation_backward(Stack& stack) {
  const auto dout = stack.pop<Tensor>();
  const auto input = stack.pop<Tensor>();
  const auto bias = stack.pop<OptionalTensor>();
  const auto kind = stack.pop<int64_t>();
  const bool need_dinput = stack.pop<bool>();
  const bool need_dbias = stack.pop<bool>();

  ActivationParams p = make_params("input", input, kind);
  check_bias(p, input, bias);
  require_like("dout", dout, "input", input);
  if (need_dbias && !bias) fail("bias", "a tensor, for its gradient", "None");
  Tensor dinput =
      need_dinput ? empty_dense_like(input) : empty_contiguous({0}, dtype_code(input), input);
  Tensor dbias = need_dbias ? empty_contiguous(bias->sizes(), dtype_code(*bias), *bias)
                            : empty_contiguous({0}, dtype_code(bias ? *bias : input), input);
  if (need_dinput || need_dbias) {
    Walk walk("input", input, input.sizes());
    if (need_dinput) walk.add(p.dinput, dinput);
    walk.add(p.input, input);
    walk.add(p.dout, dout);
    if (bias) walk.add(p.bias, *bias);
    p.dbias = need_dbias ? dbias.data_ptr() : nullptr;
    walk.finish(p, need_dbias);
    run_backward(p, input);
  }
  stack.push(dinput);
  stack.push(dbias);
}

// The gate and up of one packed tensor, or the two tensors.
struct Gated {
  ActivationParams params;
  Tensor gate;       // of the shape of out
  int64_t half = 0;  // elements from gate to up in every row of a packed tensor; 0: two tensors

  Gated(const Tensor& given, const OptionalTensor& up, int64_t kind)
      : params(make_params("gate", given, kind)), gate(given) {
    if (up) {
      require_like("up", *up, "gate", given);
      return;
    }
    const int64_t dims = given.dim();
    const int64_t columns = dims > 0 ? given.sizes()[dims - 1] : 0;
    if (dims < 1 || columns % 2 != 0) {
      fail("gate", "shape (..., 2 n), gate and up side by side, where up is None",
           shape_text(given));
    }
    half = columns / 2;
    gate = torch::stable::narrow(gate, dims - 1, 0, half);
  }

  // Adds the tensor, or the second half of the packed one.
  void add_second(Walk& walk, ActivationView& view, const Tensor& packed,
                  const OptionalTensor& up) const {
    if (up) {
      walk.add(view, *up);
    } else {
      const int64_t stride = packed.strides()[packed.dim() - 1];
      walk.add(view, packed, half * stride, static_cast<int64_t>(dtype_size(params.dtype)));
    }
  }
};

// gated_activation(gate, up, kind) -> out
void gated_activation(Stack& stack) {
  const auto given = stack.pop<Tensor>();
  const auto up = stack.pop<OptionalTensor>();
  const auto kind = stack.pop<int64_t>();

  Gated gated(given, up, kind);
  ActivationParams& p = gated.params;
  Tensor out = !up && is_contiguous(given)
                   ? empty_contiguous(gated.gate.sizes(), dtype_code(given), given)
                   : empty_dense_like(gated.gate);
  Walk walk("gate", given, gated.gate.sizes());
  walk.add(p.out, out);
  walk.add(p.input, gated.gate);
  gated.add_second(walk, p.up, given, up);
  walk.finish(p, false);
  run_forward(p, given);
  stack.push(out);
}

// gated_activation_backward(dout, gate, up, kind) -> (dgate, dup); of a packed gate one gradient,
// and a dup of shape (0,).
void gated_activation_backward(Stack& stack) {
  const auto dout = stack.pop<Tensor>();
  const auto given = stack.pop<Tensor>();
  const auto up = stack.pop<OptionalTensor>();
  const auto kind = stack.pop<int64_t>();

  Gated gated(given, up, kind);
  ActivationParams& p = gated.params;
  require_like("dout", dout, "gate", gated.gate);
  Tensor dgate = empty_dense_like(given);
  Tensor dup = up ? empty_dense_like(*up) : empty_contiguous({0}, dtype_code(given), given);
  Walk walk("gate", given, gated.gate.sizes());
  walk.add(p.dinput, dgate);
  walk.add(p.input, gated.gate);
  walk.add(p.dout, dout);
  gated.add_second(walk, p.up, given, up);
  gated.add_second(walk, p.dup, dgate, up ? OptionalTensor(dup) : std::nullopt);
  walk.finish(p, false);
  run_backward(p, given);
  stack.push(dgate);
  stack.push(dup);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def("activation(Tensor input, Tensor? bias, int kind) -> Tensor");
  m.def(
      "activation_backward(Tensor dout, Tensor input, Tensor? bias, int kind, bool need_dinput, "
      "bool need_dbias) -> (Tensor dinput, Tensor dbias)");
  m.def("gated_activation(Tensor gate, Tensor? up, int kind) -> Tensor");
  m.def(
      "gated_activation_backward(Tensor dout, Tensor gate, Tensor? up, int kind) -> (Tensor dgate, "
      "Tensor dup)");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("activation", boxed<activation>);
  m.impl("activation_backward", boxed<activation_backward>);
  m.impl("gated_activation", boxed<gated_activation>);
  m.impl("gated_activation_backward", boxed<gated_activation_backward>);
}

#ifdef FASTATTN_ON_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("activation", boxed<activation>);
  m.impl("activation_backward", boxed<activation_backward>);
  m.impl("gated_activation", boxed<gated_activation>);
  m.impl("gated_activation_backward", boxed<gated_activation_backward>);
}
#endif

}  // namespace
}  // namespace fastattn::bind
