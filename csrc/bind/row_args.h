// Tensors as rows: the trailing dimensions of each are one row, the leading ones number the rows.
#pragma once

#include <vector>

#include "fastattn/norm_params.h"
#include "tensor_args.h"

namespace fastattn::bind {

// The common shape of the tensors of an op, and the order in which their rows are visited: that of
// `like` in memory, so that rows beside each other are done after each other.
class RowProblem {
 public:
  static constexpr int64_t kMostDims = 64;  // of a tensor, as in torch's own loops
  RowProblem(const Tensor& like, int64_t row_dims);

  // Registers a tensor of the shape of `like`, but for its row. It must outlive the problem.
  void add(const Tensor& tensor, ConstRows* view);
  void add(const Tensor& tensor, MutableRows* view);
  // Registers the number of a row, whatever the strides.
  void add_row_numbers(int64_t (&row_stride)[kRowDims]);

  // Merges the leading dimensions that are one for all registered tensors, and fills the views.
  void resolve(const char* argument, RowShape* shape);

  // A dense tensor with the leading dimensions of `like`, in its memory order, and these rows.
  Tensor empty(Sizes row_sizes, int32_t dtype) const;

  Sizes leading() const {
    return {like_.sizes().data(), static_cast<size_t>(leading_dims_)};
  }
  Sizes row() const {
    return {like_.sizes().data() + leading_dims_, static_cast<size_t>(row_dims_)};
  }
  int64_t rows() const;
  int64_t width() const;

 private:
  static constexpr int kMostViews = 8;
  struct View {
    int64_t stride[kMostDims];  // of the leading dimensions
    int64_t* resolved;
  };
  View& new_view(int64_t (&resolved)[kRowDims]);
  void add_strides(const Tensor& tensor, int64_t (&resolved)[kRowDims]);

  const Tensor& like_;
  int64_t row_dims_, leading_dims_;
  // NOTE: arrays, not vectors: a short norm takes less time than a few allocations.
  int64_t order_[kMostDims];  // of the leading dimensions, outermost in memory first
  View views_[kMostViews];
  int num_views_ = 0;
  std::vector<Tensor> held_;  // contiguous copies
};

}  // namespace fastattn::bind
