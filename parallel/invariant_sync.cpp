// Invariant gradient sums (see invariant_sync.h).
#include "parallel/invariant_sync.h"

#include <utility>

#include "core/base/error.h"
#include "core/nn/row_tree.h"

namespace dattn {
namespace {

TensorView segment(const TensorView& data, Interval elements) {
  return {data.ptr<float>() + elements.begin, DType::kF32, {elements.count()}, data.device};
}

std::size_t bytes_of(const TensorView& view) { return static_cast<std::size_t>(view.bytes()); }

}  // namespace

int row_groups(std::int64_t batch) {
  int groups = 1;
  while (groups < kMostGroups && batch % (2 * groups) == 0) groups *= 2;
  return groups;
}

void all_reduce_tree(Communicator& group, const TensorView& data, const OpLabel& label) {
  const int me = group.rank(), ranks = group.size();
  ensure((ranks & (ranks - 1)) == 0, "{}: a tree over {} ranks, which is no power of two", label.verb, ranks);
  ensure(data.dtype == DType::kF32 && data.contiguous(), "{}: a tree sums contiguous fp32 tensors", label.verb);
  std::vector<Interval> held{{0, data.elements()}};  // after each round
  std::vector<Interval> given;
  const Tensor arrived = Tensor::uninitialized(DType::kF32, {(data.elements() + 1) / 2});
  for (int distance = 1; distance < ranks; distance *= 2) {
    const Interval whole = held.back();
    const Interval low{whole.begin, whole.begin + whole.count() / 2}, high{low.end, whole.end};
    const bool upper = (me & distance) != 0;
    held.push_back(upper ? high : low);
    given.push_back(upper ? low : high);
    const TensorView mine = segment(data, held.back()), theirs = segment(data, given.back());
    const SendPart send{me ^ distance, theirs.data, bytes_of(theirs), data.device};
    const RecvPart receive{me ^ distance, arrived->data, bytes_of(mine), data.device};
    group.exchange({&send, 1}, {&receive, 1}, label);
    add_contiguous(segment(arrived, {0, mine.elements()}), mine);  // a + b = b + a: the partner's sums have the same bits
  }
  for (int distance = ranks / 2; distance > 0; distance /= 2) {
    const TensorView mine = segment(data, held.back()), theirs = segment(data, given.back());
    const SendPart send{me ^ distance, mine.data, bytes_of(mine), data.device};
    const RecvPart receive{me ^ distance, theirs.data, bytes_of(theirs), data.device};
    group.exchange({&send, 1}, {&receive, 1}, label);
    held.pop_back();
    given.pop_back();
  }
}

InvariantGradientSync::InvariantGradientSync(const Mesh& mesh, std::span<Parameter* const> parameters, std::int64_t batch,
                                             std::int64_t bucket_bytes)
    : GradientSync(mesh, parameters, bucket_bytes, Updates::kAll), rows_per_group_(batch / row_groups(batch)) {
  ensure(mesh.shape().size(Axis::kTensor) == 1 && row_groups(batch) % mesh.shape().size(Axis::kData) == 0,
         "invariant sums of {} rows on mesh {}", batch, mesh.shape().text());
}

void InvariantGradientSync::piece_done() {
  finish_row();
  if (open_.empty()) {
    for (const Parameter* parameter : parameters()) open_.emplace_back(DType::kF32, parameter->gradient->shape);
  }
  for (std::size_t i = 0; i < open_.size(); ++i) {
    Tensor& gradient = parameters()[i]->gradient;
    if (rows_done_ == 0)
      std::swap(open_[i], gradient);
    else
      add_contiguous(gradient, open_[i]);
    fill_zero(gradient);
  }
  if (++rows_done_ == rows_per_group_) close_group();
}

// The row's gradients, summed over the sequence; those of two uses of a parameter are added when both are whole.
void InvariantGradientSync::finish_row() {
  std::vector<TensorView> views;
  for (const Parameter* parameter : parameters()) {
    views.push_back(parameter->gradient);
    if (parameter->gradient2.defined()) views.push_back(parameter->gradient2);
  }
  all_reduce_in_buckets(mesh().sequence(), views, bucket_bytes(), {.verb = "gradient"}, all_reduce_tree);
  for (const Parameter* parameter : parameters()) {
    if (!parameter->gradient2.defined()) continue;
    add_contiguous(parameter->gradient2, parameter->gradient);
    fill_zero(parameter->gradient2);
  }
}

// As a binary counter carries: equal subtrees are joined.
void InvariantGradientSync::close_group() {
  rows_done_ = 0;
  closed_.push_back(std::exchange(open_, {}));
  for (std::int64_t count = ++groups_done_; count % 2 == 0; count /= 2) {
    for (std::size_t i = 0; i < closed_.back().size(); ++i) add_contiguous(closed_.back()[i], closed_[closed_.size() - 2][i]);
    open_ = std::move(closed_.back());  // memory for the next group
    closed_.pop_back();
  }
}

void InvariantGradientSync::sum() {
  ensure(closed_.size() == 1 && rows_done_ == 0, "a step's sum of {} subtrees and {} rows", closed_.size(), rows_done_);
  std::vector<TensorView> views;
  for (std::size_t i = 0; i < parameters().size(); ++i) {
    std::swap(parameters()[i]->gradient, closed_[0][i]);
    views.push_back(parameters()[i]->gradient);
  }
  if (open_.empty()) open_ = std::move(closed_[0]);
  closed_.clear();
  groups_done_ = 0;
  all_reduce_in_buckets(mesh().axis(Axis::kData), views, bucket_bytes(), {.verb = "gradient"}, all_reduce_tree);
}

}  // namespace dattn
