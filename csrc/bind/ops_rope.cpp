// The ops of rotary embedding: torch.ops.fastattn.rope*.

#include "backend.h"
#include "dense_like.h"
#include "fastattn/api.h"
#include "status.h"
#include "threads.h"

namespace fastattn::bind {
namespace {

// The tail of every op's schema. cos and sin are tables (rows, rotary_dim / 2), or have a row for
// each token, (*batch, length, rotary_dim / 2); positions is (*batch, length), offsets (*batch),
// both broadcast.
#define FASTATTN_ROPE_OPTIONS                                                               \
  "Tensor cos, Tensor sin, Tensor? positions=None, Tensor? offsets=None, SymInt offset=0, " \
  "bool interleaved=False, bool bshd=False, bool inverse=False"

struct RopeOptions {
  Tensor cos, sin;
  OptionalTensor positions, offsets;
  int64_t offset;
  bool interleaved, bshd, inverse;

  explicit RopeOptions(Stack& stack)
      : cos(stack.pop<Tensor>()),
        sin(stack.pop<Tensor>()),
        positions(stack.pop<OptionalTensor>()),
        offsets(stack.pop<OptionalTensor>()),
        offset(stack.pop<int64_t>()),
        interleaved(stack.pop<bool>()),
        bshd(stack.pop<bool>()),
        inverse(stack.pop<bool>()) {}
};

// What is rotated, by its argument's name.
struct Operand {
  const char* name;
  const Tensor* x;
};

std::string got(int64_t value) {
  return std::to_string(value);
}

int token_dim(const RopeParams& p, bool bshd) {
  return p.batch_dims + (bshd ? 0 : 1);
}

void set_batch(RopeParams& p, const Operand& first, bool bshd) {
  const Sizes sizes = first.x->sizes();
  const int dims = static_cast<int>(sizes.size());
  if (dims < 3 || dims - 3 > kRopeBatchDims) {
    fail(first.name,
         std::string("3 to ") + got(kRopeBatchDims + 3) + " dimensions (*batch, " +
             (bshd ? "length, heads" : "heads, length") + ", head_dim)",
         shape_text(*first.x));
  }
  p.batch_dims = dims - 3;
  for (int d = 0; d < p.batch_dims; ++d) p.batch_size[d] = sizes[d];
  p.length = sizes[token_dim(p, bshd)];
  p.dtype = require_float(first.name, *first.x);
}

void set_strides(const RopeParams& p, const Tensor& x, bool bshd, int64_t (&batch)[kRopeBatchDims],
                 int64_t (&stride)[3]) {
  const Sizes strides = x.strides();
  for (int d = 0; d < p.batch_dims; ++d) batch[d] = strides[d];
  stride[0] = strides[p.batch_dims + (bshd ? 1 : 0)];
  stride[1] = strides[token_dim(p, bshd)];
  stride[2] = strides[p.batch_dims + 2];
}

// NOTE: `out` of the operand is x until set_out names another tensor.
void add_operand(RopeParams& p, const Operand& given, const Operand& first, bool bshd) {
  const Tensor& x = *given.x;
  const Sizes sizes = x.sizes();
  if (given.x != first.x) {
    require_device_of(*first.x, given.name, x, first.name);
    if (float_dtype(x) != p.dtype) {
      fail(given.name, std::string("dtype of ") + first.name, dtype_text(x));
    }
    bool fits = static_cast<int>(sizes.size()) == p.batch_dims + 3;
    for (int d = 0; fits && d < p.batch_dims; ++d) fits = sizes[d] == p.batch_size[d];
    if (!fits || sizes[token_dim(p, bshd)] != p.length) {
      fail(given.name,
           std::string("the leading dimensions and the length of ") + first.name + ", " +
               shape_text(*first.x),
           shape_text(x));
    }
  }
  RopeOperand& operand = p.operand[p.num_operands++];
  operand.x = operand.out = x.data_ptr();
  operand.heads = sizes[p.batch_dims + (bshd ? 1 : 0)];
  operand.head_dim = sizes[p.batch_dims + 2];
  set_strides(p, x, bshd, operand.x_batch_stride, operand.x_stride);
  set_strides(p, x, bshd, operand.out_batch_stride, operand.out_stride);
  if (p.rotary_dim > operand.head_dim) {
    fail("cos",
         std::string("at most ") + got(operand.head_dim / 2) + " columns, half the head_dim of " +
             given.name,
         got(p.rotary_dim / 2));
  }
}

void set_out(RopeParams& p, int n, const Tensor& out, bool bshd) {
  p.operand[n].out = out.data_ptr();
  set_strides(p, out, bshd, p.operand[n].out_batch_stride, p.operand[n].out_stride);
}

// Strides over the leading dimensions, 0 where the size is 1. `tail` is the text of what follows.
void set_batch_strides(const RopeParams& p, const char* argument, const Tensor& x,
                       const char* expected, int64_t (&stride)[kRopeBatchDims]) {
  const Sizes sizes = x.sizes(), strides = x.strides();
  for (int d = 0; d < p.batch_dims; ++d) {
    if (sizes[d] != 1 && sizes[d] != p.batch_size[d]) {
      fail(argument,
           std::string(expected) + " with *batch " + text_of(Sizes(p.batch_size, p.batch_dims)),
           shape_text(x));
    }
    stride[d] = sizes[d] == 1 ? 0 : strides[d];
  }
}

// Returns whether positions choose from the rows; else there is a row for each token.
bool set_tables(RopeParams& p, const Operand& first, const RopeOptions& o) {
  const std::optional<DType> dtype = float_dtype(o.cos);
  if (!dtype) require_float("cos", o.cos);
  p.table_dtype = *dtype;
  if (float_dtype(o.sin) != dtype) fail("sin", "dtype of cos", dtype_text(o.sin));
  require_device_of(*first.x, "cos", o.cos, first.name);
  require_device_of(*first.x, "sin", o.sin, first.name);
  require_shape("sin", o.sin, o.cos.sizes());
  const Sizes sizes = o.cos.sizes();
  const int dims = static_cast<int>(sizes.size());
  const char* expected = "shape (positions, rotary_dim / 2) or (*batch, length, rotary_dim / 2)";
  if (dims != 2 && dims != p.batch_dims + 2) fail("cos", expected, shape_text(o.cos));
  p.rotary_dim = 2 * sizes[dims - 1];
  p.table_rows = sizes[dims - 2];
  p.cos = o.cos.data_ptr(), p.sin = o.sin.data_ptr();
  for (int d = 0; d < 2; ++d) {
    p.cos_stride[d] = o.cos.strides()[dims - 2 + d];
    p.sin_stride[d] = o.sin.strides()[dims - 2 + d];
  }
  if (dims == 2) return true;
  set_batch_strides(p, "cos", o.cos, expected, p.cos_batch_stride);
  set_batch_strides(p, "sin", o.sin, expected, p.sin_batch_stride);
  if (sizes[dims - 2] != p.length) {
    fail("cos", std::string(expected) + " with length " + got(p.length), shape_text(o.cos));
  }
  if (o.positions) fail("positions", "None beside a cos with a row for each token", "a tensor");
  if (o.offsets || o.offset != 0) {
    fail("offset", "0 beside a cos with a row for each token",
         o.offsets ? "a tensor" : got(o.offset));
  }
  return false;
}

void set_indices(const RopeParams& p, const Operand& first, const char* argument, const Tensor& x,
                 bool per_token, RopeIndices& indices) {
  const int32_t code = dtype_code(x);
  indices.is_int64 = code == aoti_torch_dtype_int64();
  if (!indices.is_int64 && code != aoti_torch_dtype_int32()) {
    fail(argument, "dtype torch.int32 or torch.int64", dtype_text(x));
  }
  require_device_of(*first.x, argument, x, first.name);
  const char* expected = per_token ? "shape (length,) or (*batch, length)" : "shape () or (*batch)";
  const int own = per_token ? 1 : 0, dims = static_cast<int>(x.dim());
  if (dims != own && dims != p.batch_dims + own) fail(argument, expected, shape_text(x));
  if (dims != own) set_batch_strides(p, argument, x, expected, indices.batch_stride);
  if (per_token) {
    if (x.sizes()[dims - 1] != p.length) {
      fail(argument, std::string(expected) + " with length " + got(p.length), shape_text(x));
    }
    indices.stride = x.strides()[dims - 1];
  }
  indices.data = x.data_ptr();
}

// Every row that a token takes is one of the tables'.
void check_positions(const RopeParams& p) {
  const int64_t rows = p.table_rows;
  const std::string limit = got(rows) + ", the rows of cos";
  const int64_t batch = p.length > 0 ? rope_batch(p) : 0;
  const bool same_for_all = p.positions.data == nullptr && p.offsets.data == nullptr;
  for (int64_t b = 0; b < (same_for_all ? min_of<int64_t>(batch, 1) : batch); ++b) {
    const int64_t offset = rope_offset(p, b);
    const int64_t first = rope_batch_offset(p, p.positions.batch_stride, b);
    if (p.positions.data == nullptr) {
      if (offset < 0 || offset > rows - p.length) {
        fail("offset", "offset >= 0 and offset + length <= " + limit,
             "offset " + got(offset) + " with length " + got(p.length));
      }
      continue;
    }
    for (int64_t i = 0; i < p.length; ++i) {
      const int64_t position = rope_position(p, first, i);
      int64_t row = 0;
      if (__builtin_add_overflow(position, offset, &row) || row < 0 || row >= rows) {
        fail("positions", "0 <= positions + offset < " + limit,
             got(position) + " with offset " + got(offset));
      }
    }
  }
}

RopeParams make_params(const RopeOptions& o, const Operand& first, const Operand* second) {
  RopeParams p{};
  set_batch(p, first, o.bshd);
  const Backend backend = backend_of(*first.x);
  require_kernels_of_dtype(backend, first.name, *first.x);
  const bool has_positions = set_tables(p, first, o);
  p.offset = o.offset;
  p.interleaved = o.interleaved;
  p.inverse = o.inverse;
  add_operand(p, first, first, o.bshd);
  if (second) add_operand(p, *second, first, o.bshd);
  if (o.positions) set_indices(p, first, "positions", *o.positions, true, p.positions);
  if (o.offsets) set_indices(p, first, "offset", *o.offsets, false, p.offsets);
  const bool is_known = !backend.on_device || !(o.positions || o.offsets);
  if (has_positions && is_known) check_positions(p);
  return p;
}

void require_own_memory(const Operand& operand) {
  const Sizes sizes = operand.x->sizes(), strides = operand.x->strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] == 0) {
      fail(operand.name, "a tensor whose elements do not share memory, to be written in place",
           "strides " + text_of(strides));
    }
  }
}

void run(const RopeParams& p, [[maybe_unused]] const Tensor& x) {
#ifdef FASTATTN_WITH_CUDA
  if (backend_of(x).cuda) return check_cuda_status(cuda::rope(p, place_of(x)));
#endif
  check_status(cpu::rope(p, torch_threads()));
}

// rope(x, OPTIONS) -> out
void rope(Stack& stack) {
  const auto x = stack.pop<Tensor>();
  const RopeOptions options(stack);
  RopeParams p = make_params(options, {"x", &x}, nullptr);
  Tensor out = empty_dense_like(x);
  set_out(p, 0, out, options.bshd);
  run(p, x);
  stack.push(out);
}

// rope_(x, OPTIONS) -> (), x overwritten
void rope_in_place(Stack& stack) {
  const auto x = stack.pop<Tensor>();
  const RopeOptions options(stack);
  const Operand operand{"x", &x};
  const RopeParams p = make_params(options, operand, nullptr);
  require_own_memory(operand);
  run(p, x);
}

// rope_qk(query, key, OPTIONS) -> (query, key)
void rope_qk(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const RopeOptions options(stack);
  const Operand second{"key", &key};
  RopeParams p = make_params(options, {"query", &query}, &second);
  Tensor query_out = empty_dense_like(query), key_out = empty_dense_like(key);
  set_out(p, 0, query_out, options.bshd);
  set_out(p, 1, key_out, options.bshd);
  run(p, query);
  stack.push(query_out);
  stack.push(key_out);
}

// rope_qk_(query, key, OPTIONS) -> (), both overwritten
void rope_qk_in_place(Stack& stack) {
  const auto query = stack.pop<Tensor>();
  const auto key = stack.pop<Tensor>();
  const RopeOptions options(stack);
  const Operand first{"query", &query}, second{"key", &key};
  const RopeParams p = make_params(options, first, &second);
  require_own_memory(first);
  require_own_memory(second);
  run(p, query);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def("rope(Tensor x, " FASTATTN_ROPE_OPTIONS ") -> Tensor");
  m.def("rope_(Tensor(a!) x, " FASTATTN_ROPE_OPTIONS ") -> ()");
  m.def("rope_qk(Tensor query, Tensor key, " FASTATTN_ROPE_OPTIONS
        ") -> (Tensor query_out, Tensor key_out)");
  m.def("rope_qk_(Tensor(a!) query, Tensor(b!) key, " FASTATTN_ROPE_OPTIONS ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("rope", boxed<rope>);
  m.impl("rope_", boxed<rope_in_place>);
  m.impl("rope_qk", boxed<rope_qk>);
  m.impl("rope_qk_", boxed<rope_qk_in_place>);
}

#ifdef FASTATTN_ON_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("rope", boxed<rope>);
  m.impl("rope_", boxed<rope_in_place>);
  m.impl("rope_qk", boxed<rope_qk>);
  m.impl("rope_qk_", boxed<rope_qk_in_place>);
}
#endif

}  // namespace
}  // namespace fastattn::bind
