#include "row_args.h"

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
  if (like.dim() > kMostDims) fail("input", "at most 64 dimensions", shape_text(like));
  const Sizes strides = like.strides();
  for (int64_t d = 0; d < leading_dims_; ++d) {  // by insertion: equal strides keep their order
    int64_t at = d;
    for (; at > 0; --at) {
      if (strides[static_cast<size_t>(order_[at - 1])] >= strides[static_cast<size_t>(d)]) break;
      order_[at] = order_[at - 1];
    }
    order_[at] = d;
  }
}

int64_t RowProblem::rows() const {
  return product(leading());
}

int64_t RowProblem::width() const {
  return product(row());
}

RowProblem::View& RowProblem::new_view(int64_t (&resolved)[kRowDims]) {
  if (num_views_ == kMostViews) throw std::logic_error("fastattn: more views than a norm has");
  View& view = views_[num_views_++];
  view.resolved = resolved;
  return view;
}

void RowProblem::add_strides(const Tensor& tensor, int64_t (&resolved)[kRowDims]) {
  View& view = new_view(resolved);
  const Sizes strides = tensor.strides();
  for (int64_t d = 0; d < leading_dims_; ++d) view.stride[d] = strides[static_cast<size_t>(d)];
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
  add_strides(*source, view->stride);
}

void RowProblem::add(const Tensor& tensor, MutableRows* view) {
  view->data = tensor.data_ptr();
  add_strides(tensor, view->stride);
}

void RowProblem::add_row_numbers(int64_t (&row_stride)[kRowDims]) {
  View& view = new_view(row_stride);
  int64_t next = 1;
  for (int64_t d = leading_dims_; d-- > 0; next *= like_.sizes()[static_cast<size_t>(d)]) {
    view.stride[d] = next;
  }
}

void RowProblem::resolve(const char* argument, RowShape* shape) {
  const Sizes sizes = like_.sizes();
  shape->rows = rows();
  shape->width = width();
  shape->dims = 0;
  for (int64_t i = 0; i < leading_dims_; ++i) {
    const size_t d = static_cast<size_t>(order_[i]);
    if (sizes[d] == 1) continue;
    bool merges = shape->dims > 0;
    for (int v = 0; merges && v < num_views_; ++v) {
      merges = views_[v].resolved[shape->dims - 1] == views_[v].stride[d] * sizes[d];
    }
    if (!merges && shape->dims == kRowDims) {
      fail(argument, "strides that merge its leading dimensions into at most 8",
           shape_text(like_) + " with strides " + text_of(like_.strides()));
    }
    if (!merges) shape->size[shape->dims++] = 1;
    const int last = shape->dims - 1;
    shape->size[last] *= sizes[d];
    for (int v = 0; v < num_views_; ++v) views_[v].resolved[last] = views_[v].stride[d];
  }
  if (shape->dims > 0) return;
  shape->dims = 1;
  shape->size[0] = 1;
  for (int v = 0; v < num_views_; ++v) views_[v].resolved[0] = 0;
}

Tensor RowProblem::empty(Sizes row_sizes, int32_t dtype) const {
  const Sizes outer = leading();
  const size_t outer_dims = outer.size(), dims = outer_dims + row_sizes.size();
  int64_t sizes[kMostDims], strides[kMostDims];
  for (size_t d = 0; d < outer_dims; ++d) sizes[d] = outer[d];
  for (size_t d = outer_dims; d < dims; ++d) sizes[d] = row_sizes[d - outer_dims];
  int64_t next = 1;
  for (size_t d = dims; d-- > outer_dims; next *= max_of<int64_t>(sizes[d], 1)) strides[d] = next;
  for (size_t i = outer_dims; i-- > 0;) {
    const int64_t d = order_[i];
    strides[d] = next;
    next *= max_of<int64_t>(sizes[d], 1);
  }
  return empty_strided(Sizes(sizes, dims), Sizes(strides, dims), dtype, like_);
}

}  // namespace fastattn::bind
