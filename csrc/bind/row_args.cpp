#include "row_args.h"

#include "output_memory.h"

namespace fastattn::bind {
namespace {

int64_t product(Sizes sizes) {
  int64_t result = 1;
  for (size_t d = 0; d < sizes.size(); ++d) result *= sizes[d];
  return result;
}

// The distance between the elements of a row, or nothing where it is not the same for all.
std::optional<int64_t> step_of(const Tensor& tensor, int64_t row_dims) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  std::optional<int64_t> step;
  int64_t next = 0;
  for (int64_t d = tensor.dim() - 1; d >= tensor.dim() - row_dims; --d) {
    const size_t at = static_cast<size_t>(d);
    if (sizes[at] == 1) continue;
    if (!step) {
      step = strides[at];
    } else if (strides[at] != next) {
      return std::nullopt;
    }
    next = strides[at] * sizes[at];
  }
  return step ? step : 1;
}

}  // namespace

RowProblem::RowProblem(const Tensor& like, int64_t row_dims)
    : like_(like), row_dims_(row_dims), leading_dims_(like.dim() - row_dims) {
  const Sizes strides = like.strides();
  for (int64_t d = 0; d < leading_dims_; ++d) {  // by insertion: equal strides keep their order
    order_.push_back(d);
    for (size_t i = order_.size() - 1; i > 0; --i) {
      const size_t a = static_cast<size_t>(order_[i - 1]), b = static_cast<size_t>(order_[i]);
      if (strides[a] >= strides[b]) break;
      std::swap(order_[i - 1], order_[i]);
    }
  }
}

int64_t RowProblem::rows() const {
  return product(leading());
}

int64_t RowProblem::width() const {
  return product(row());
}

std::vector<int64_t> RowProblem::leading_strides(const Tensor& tensor) const {
  const Sizes strides = tensor.strides();
  return {strides.data(), strides.data() + leading_dims_};
}

void RowProblem::add(const Tensor& tensor, ConstRows* view) {
  const Tensor* source = &tensor;
  std::optional<int64_t> step = step_of(tensor, row_dims_);
  if (!step) {  // rows whose elements no single distance describes
    held_.push_back(torch::stable::contiguous(tensor));
    source = &held_.back();
    step = 1;
  }
  view->data = source->data_ptr();
  view->step = *step;
  views_.push_back({leading_strides(*source), view->stride});
}

void RowProblem::add(const Tensor& tensor, MutableRows* view) {
  view->data = tensor.data_ptr();
  views_.push_back({leading_strides(tensor), view->stride});
}

void RowProblem::add_row_numbers(int64_t (&row_stride)[kRowDims]) {
  std::vector<int64_t> stride(static_cast<size_t>(leading_dims_));
  int64_t next = 1;
  for (size_t d = stride.size(); d-- > 0; next *= like_.sizes()[d]) stride[d] = next;
  views_.push_back({stride, row_stride});
}

void RowProblem::resolve(const char* argument, RowShape* shape) {
  const Sizes sizes = like_.sizes();
  shape->rows = rows();
  shape->width = width();
  shape->dims = 0;
  for (const int64_t dim : order_) {
    const size_t d = static_cast<size_t>(dim);
    if (sizes[d] == 1) continue;
    bool merges = shape->dims > 0;
    for (const View& view : views_) {
      if (!merges) break;
      merges = view.resolved[shape->dims - 1] == view.stride[d] * sizes[d];
    }
    if (!merges && shape->dims == kRowDims) {
      fail(argument, "strides that merge its leading dimensions into at most 8",
           shape_text(like_) + " with strides " + text_of(like_.strides()));
    }
    if (!merges) shape->size[shape->dims++] = 1;
    const int last = shape->dims - 1;
    shape->size[last] *= sizes[d];
    for (const View& view : views_) view.resolved[last] = view.stride[d];
  }
  if (shape->dims > 0) return;
  shape->dims = 1;
  shape->size[0] = 1;
  for (const View& view : views_) view.resolved[0] = 0;
}

Tensor RowProblem::empty(Sizes row_sizes, int32_t dtype) const {
  const Sizes outer = leading();
  std::vector<int64_t> sizes(outer.data(), outer.data() + outer.size());
  sizes.insert(sizes.end(), row_sizes.data(), row_sizes.data() + row_sizes.size());
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  for (size_t d = sizes.size(); d-- > outer.size(); next *= max_of<int64_t>(sizes[d], 1)) {
    strides[d] = next;
  }
  for (size_t i = order_.size(); i-- > 0;) {
    const size_t d = static_cast<size_t>(order_[i]);
    strides[d] = next;
    next *= max_of<int64_t>(sizes[d], 1);
  }
  Tensor tensor = empty_strided(sizes, strides, dtype, like_);
  prefer_huge_pages(tensor, dtype == aoti_torch_dtype_float64()   ? 8
                            : dtype == aoti_torch_dtype_float32() ? 4
                                                                  : 2);
  return tensor;
}

}  // namespace fastattn::bind
