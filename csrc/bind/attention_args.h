// What the attention ops share: their common arguments, the checks, and the kernels' params made
// from them.
#pragma once

#include <vector>

#include "backend.h"
#include "fastattn/params.h"
#include "tensor_args.h"

namespace fastattn::bind {

// The tail of every attention op's schema. mask and bias have any shape that broadcasts to (*batch,
// heads, Sq, Sk), or, for packed sequences, to (sequences, heads, max_seqlen_q, max_seqlen_k);
// alibi_slopes broadcasts to (*batch, heads). Every option has a default, and callers name those
// they need: an argument given costs the dispatcher 0.2 us.
#define FASTATTN_ATTENTION_OPTIONS                                                               \
  "Tensor? mask=None, Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sink=None, "         \
  "Tensor? query_lengths=None, Tensor? key_lengths=None, Tensor? cu_seqlens_q=None, "            \
  "Tensor? cu_seqlens_k=None, Tensor? philox=None, bool top_left=False, SymInt window_left=-1, " \
  "SymInt window_right=-1, SymInt query_offset=0, SymInt key_offset=0, SymInt max_seqlen_q=-1, " \
  "SymInt max_seqlen_k=-1, float? scale=None, float? softcap=None, float dropout_p=0.0, "        \
  "bool bshd=False, bool batch_invariant=False, bool deterministic=False, bool for_backward=False"

struct AttentionOptions {
  OptionalTensor mask, bias, alibi_slopes, sink, query_lengths, key_lengths;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
  OptionalTensor philox;  // int64 (seed, offset), needed when dropout_p > 0
  bool top_left = false;
  int64_t window_left = kUnlimited, window_right = kUnlimited;  // or >= 0
  int64_t query_offset = 0, key_offset = 0;
  int64_t max_seqlen_q = -1, max_seqlen_k = -1;  // of packed sequences; -1: find it
  std::optional<double> scale, softcap;
  double dropout_p = 0.0;
  bool bshd = false, batch_invariant = false, deterministic = false, for_backward = false;
};

AttentionOptions pop_options(Stack& stack);

// One attention, checked: `params` has everything but the outputs. It points into the op's
// arguments and `held`.
struct AttentionProblem {
  AttentionParams params{};
  Backend backend{};
  bool packed = false;  // (rows, heads, columns) tensors instead of (*batch, heads, rows, columns)
  bool bshd = false;    // (*batch, rows, heads, columns)
  int batch_dims = 1;   // 0 when packed, else 1 or 2
  std::vector<Tensor> held;  // contiguous copies

  // Any visible score at all? If not, no kernel needs to run: out is 0 and lse is -inf.
  bool has_scores() const {
    const AttentionParams& p = params;
    return p.batch0 > 0 && p.batch1 > 0 && p.heads_q > 0 && p.seqlen_q > 0 && p.seqlen_k > 0;
  }

  DType real_dtype() const {
    return params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }

  int row_dim() const {
    return packed ? 0 : batch_dims + (bshd ? 0 : 1);
  }
  int head_dim() const {
    return packed ? 1 : batch_dims + (bshd ? 1 : 0);
  }

  // Strides of a tensor laid out like query, key, value or out.
  template <typename View>
  View view(const Tensor& tensor) const;

  // The shape of lse: (*batch, heads, rows), or (heads, rows) when packed.
  std::vector<int64_t> lse_shape(const Tensor& query) const;
  template <typename View>
  View lse_view(const Tensor& lse) const;

  // The strides of `tensor` over the score matrix, 0 where its size is 1.
  template <typename View>
  View score_view(const Tensor& tensor) const;

  // A new tensor of the shape of `like` with `columns` columns. Like SDPA's, its memory order is
  // that of `like`, so that what a transpose did before the op, a transpose after it undoes without
  // a copy.
  Tensor empty_in_order_of(const Tensor& like, int64_t columns) const;

  // Zeroes the rows of `tensor` (packed, contiguous) that belong to no sequence, unless the kernels
  // have done it.
  void zero_unused_rows(const Tensor& tensor, const IndexArray& cu_seqlens) const;
};

// Throws when the arguments do not fit together; nothing is written before it returns. `value` may
// be null. What lies on a device is not read: of lengths and bounds, shapes and dtypes are checked
// and kernels guard against the rest; the longest sequences are taken from max_seqlen_*, or from
// the number of rows.
AttentionProblem make_problem(const Backend& backend, const Tensor& query, const Tensor& key,
                              const Tensor* value, const AttentionOptions& options);

// Runs the forward pass of a problem whose outputs it allocates: (out, lse).
std::pair<Tensor, Tensor> run_attention(AttentionProblem& problem, const Tensor& query);

// Pieces of make_problem that attention over a cache shares.

void require_like_query(const Tensor& query, const char* argument, const Tensor& tensor);

// cu_seqlens: 0 = cu[0] <= cu[1] <= ... <= rows. Returns the largest difference.
int64_t check_cu_seqlens(const char* argument, const IndexArray& cu, int64_t count, int64_t rows);

// cu_seqlens_q, and what it makes of batch0 and seqlen_q.
void set_packed_queries(AttentionProblem& problem, const AttentionOptions& options);

// query_lengths, key_lengths: one length per sequence, within the sequence.
IndexArray sequence_lengths(AttentionProblem& problem, const char* argument,
                            const OptionalTensor& lengths, const IndexArray& cu, int64_t rows);

// Comes before anything is read: an op runs where any of its tensors is on a GPU, also where its
// query is not.
void require_devices_of(const Tensor& query, const AttentionOptions& options);

// Everything that shapes the scores, and the numbers. Shapes and dtype of the problem are set.
void set_options(AttentionProblem& problem, const AttentionOptions& options);

template <typename View>
View AttentionProblem::view(const Tensor& tensor) const {
  View view{};
  view.data = tensor.data_ptr();
  const Sizes strides = tensor.strides();
  for (int d = 0; d < batch_dims; ++d) view.stride[d] = strides[d];
  view.stride[2] = strides[head_dim()];
  view.stride[3] = strides[row_dim()];
  view.stride[4] = strides[strides.size() - 1];
  return view;
}

template <typename View>
View AttentionProblem::lse_view(const Tensor& lse) const {
  View view{};
  view.data = lse.data_ptr();
  const Sizes strides = lse.strides();
  for (int d = 0; d < batch_dims; ++d) view.stride[d] = strides[d];
  view.stride[2] = strides[batch_dims];
  view.stride[3] = strides[batch_dims + 1];
  return view;
}

template <typename View>
View AttentionProblem::score_view(const Tensor& tensor) const {
  View view{};
  view.data = tensor.data_ptr();
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  const int rank = static_cast<int>(sizes.size());
  for (int d = 1; d <= rank;
       ++d) {  // from the last dimension; the fourth is batch0 unless there are two batch dims
    const int to = d == 4 && batch_dims < 2 ? 0 : 5 - d;
    view.stride[to] = sizes[rank - d] == 1 ? 0 : strides[rank - d];
  }
  return view;
}

}  // namespace fastattn::bind
