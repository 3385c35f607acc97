// Shares of parameters (see parameter_shares.h).
#include "parallel/parameter_shares.h"

#include <algorithm>

#include "core/base/error.h"

namespace dattn {
namespace {

Interval overlap(Interval a, Interval b) {
  const std::int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

}  // namespace

ParameterShares::ParameterShares(std::span<Parameter* const> parameters, int parts, int part, std::int64_t bucket_bytes)
    : parameters_(parameters.begin(), parameters.end()), begins_{0}, parts_(parts), part_(part) {
  ensure(parts >= 1 && part >= 0 && part < parts, "share {} of {}", part, parts);
  const std::int64_t most = std::max<std::int64_t>(bucket_bytes / size_of(DType::kF32), 1);
  const auto is_large = [&](const Parameter* parameter) { return parameter->elements() >= most / 4; };
  const auto small = std::stable_partition(parameters_.begin(), parameters_.end(), is_large);
  for (const Parameter* parameter : parameters_) begins_.push_back(begins_.back() + parameter->elements());
  const auto larges = static_cast<std::size_t>(small - parameters_.begin());
  for (std::size_t i = 0; i < larges; ++i) add_buckets({begins_[i], begins_[i + 1]}, most);
  add_buckets({begins_[larges], begins_.back()}, most);
  own_ = of(part_);
}

// As few as can be, of about the same size.
void ParameterShares::add_buckets(Interval elements, std::int64_t most) {
  if (elements.count() == 0) return;
  const std::int64_t slot = div_up(div_up(elements.count(), div_up(elements.count(), most)), parts_);
  for (std::int64_t begin = elements.begin; begin < elements.end; begin += slot * parts_) {
    const Interval bucket{begin, std::min(elements.end, begin + slot * parts_)};
    buckets_.push_back({bucket, div_up(bucket.count(), parts_)});
  }
}

Interval ParameterShares::slot_of(const Bucket& bucket, int part) const {
  const std::int64_t begin = bucket.elements.begin + part * bucket.slot;
  return overlap({begin, begin + bucket.slot}, bucket.elements);
}

std::vector<ParameterRun> ParameterShares::runs_of(Interval elements) const {
  std::vector<ParameterRun> runs;
  const auto first = std::upper_bound(begins_.begin(), begins_.end(), elements.begin) - begins_.begin() - 1;
  for (auto i = static_cast<std::size_t>(first); i < parameters_.size() && begins_[i] < elements.end; ++i) {
    const Interval part = overlap({begins_[i], begins_[i + 1]}, elements);
    if (part.count() > 0) runs.push_back({parameters_[i], {part.begin - begins_[i], part.end - begins_[i]}});
  }
  return runs;
}

std::vector<ParameterRun> ParameterShares::of(int part) const {
  std::vector<ParameterRun> all;
  for (const Bucket& bucket : buckets_) {
    for (const ParameterRun& run : runs_of(slot_of(bucket, part))) {
      ParameterRun* last = all.empty() ? nullptr : &all.back();
      if (last != nullptr && last->parameter == run.parameter && last->elements.end == run.elements.begin)
        last->elements.end = run.elements.end;
      else
        all.push_back(run);
    }
  }
  return all;
}

template <class Exchange>
void ParameterShares::in_buckets(Tensor Parameter::*field, bool sums, const Exchange& exchange) const {
  if (parts_ == 1) return;
  const auto copy_in = [&](const ParameterRun& run, const TensorView& place) { copy(run.of(run.parameter->*field), place); };
  const auto copy_out = [&](const ParameterRun& run, const TensorView& place) { copy(place, run.of(run.parameter->*field)); };
  for (const Bucket& bucket : buckets_) {
    const std::vector<std::int64_t> counts(static_cast<std::size_t>(parts_), bucket.slot);
    const auto own_slot = [&](const TensorView& all) { return all.slice(0, part_ * bucket.slot, bucket.slot); };
    const std::vector<ParameterRun> runs = runs_of(bucket.elements), own = runs_of(slot_of(bucket, part_));
    if (runs.size() == 1 && runs[0].elements.count() == bucket.slot * parts_) {
      const TensorView all = runs[0].of(runs[0].parameter->*field);
      exchange(all, counts, own_slot(all));
      continue;
    }
    const Tensor all(DType::kF32, {bucket.slot * parts_});  // zero behind the last element
    sums ? for_each_place(runs, all, copy_in) : for_each_place(own, own_slot(all), copy_in);
    exchange(all, counts, own_slot(all));
    sums ? for_each_place(own, own_slot(all), copy_out) : for_each_place(runs, all, copy_out);
  }
}

void ParameterShares::sum_gradients(Communicator& group, const OpLabel& label) const {
  in_buckets(&Parameter::gradient, true, [&](const TensorView& all, const auto& counts, const TensorView& own) {
    group.reduce_scatter_sum(all, counts, own, label);
  });
}

void ParameterShares::gather_values(Communicator& group, const OpLabel& label) const {
  in_buckets(&Parameter::value, false,
             [&](const TensorView& all, const auto& counts, const TensorView&) { group.all_gather(all, counts, label); });
}

std::int64_t ParameterShares::values_sent() const {
  std::int64_t elements = 0;
  for (const Bucket& bucket : buckets_) elements += bucket.slot;
  return elements * size_of(DType::kF32) * (parts_ - 1);
}

}  // namespace dattn
