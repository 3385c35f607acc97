// Data parallelism (see data_parallel.h).
#include "parallel/data_parallel.h"

#include <algorithm>

#include "core/nn/optimizer.h"

namespace dattn {
namespace {

// The longest run of tensors from `first` on that fits one bucket; at least one tensor.
std::size_t end_of_bucket(std::span<const TensorView> tensors, std::size_t first, std::int64_t bucket_bytes) {
  std::int64_t bytes = tensors[first].bytes();
  std::size_t end = first + 1;
  while (end < tensors.size() && bytes + tensors[end].bytes() <= bucket_bytes) bytes += tensors[end++].bytes();
  return end;
}

void all_reduce_bucket(Communicator& group, std::span<const TensorView> tensors, const OpLabel& label, AllReduce all_reduce) {
  if (tensors.size() == 1) {
    if (!tensors[0].empty()) all_reduce(group, tensors[0], label);
    return;
  }
  std::int64_t elements = 0;
  for (const TensorView& tensor : tensors) elements += tensor.elements();
  if (elements == 0) return;
  const Tensor bucket = Tensor::uninitialized(DType::kF32, {elements});
  const auto for_each_slot = [&](const auto& body) {
    std::int64_t begin = 0;
    for (const TensorView& tensor : tensors) {
      if (!tensor.empty()) body(tensor, bucket->slice(0, begin, tensor.elements()).reshape(tensor.shape));
      begin += tensor.elements();
    }
  };
  for_each_slot([](const TensorView& tensor, const TensorView& slot) { copy(tensor, slot); });
  all_reduce(group, bucket, label);
  for_each_slot([](const TensorView& tensor, const TensorView& slot) { copy(slot, tensor); });
}

}  // namespace

void all_reduce_in_buckets(Communicator& group, std::span<const TensorView> tensors, std::int64_t bucket_bytes,
                           const OpLabel& label, AllReduce all_reduce) {
  if (group.size() == 1) return;
  for (std::size_t first = 0; first < tensors.size();) {
    const std::size_t end = end_of_bucket(tensors, first, bucket_bytes);
    all_reduce_bucket(group, tensors.subspan(first, end - first), label, all_reduce);
    first = end;
  }
}

GradientSync::GradientSync(const Mesh& mesh, std::span<Parameter* const> parameters)
    : GradientSync(mesh, parameters, std::max(kBucketBytes, kSlotBytes * mesh.replicas().size())) {}

GradientSync::GradientSync(const Mesh& mesh, std::span<Parameter* const> parameters, std::int64_t bucket_bytes)
    : GradientSync(mesh, parameters, bucket_bytes, Updates::kShare) {}

GradientSync::GradientSync(const Mesh& mesh, std::span<Parameter* const> parameters, std::int64_t bucket_bytes, Updates updates)
    : mesh_(mesh),
      parameters_(parameters.begin(), parameters.end()),
      bucket_bytes_(bucket_bytes),
      shares_(parameters, updates == Updates::kAll ? 1 : mesh.replicas().size(),
              updates == Updates::kAll ? 0 : mesh.replicas().rank(), bucket_bytes) {
  if (mesh.shape().size(Axis::kTensor) == 1) return;
  for (Parameter* parameter : parameters_) {
    if (parameter->sum_over_tensor) tensor_summed_.push_back(parameter);
  }
}

void GradientSync::sum() {
  sum_over_tensor();
  shares_.sum_gradients(mesh_.replicas(), {.verb = "gradient"});
}

void GradientSync::gather_values() { shares_.gather_values(mesh_.replicas(), {.verb = "values"}); }

void GradientSync::sum_over_tensor() {
  if (tensor_summed_.empty()) return;
  std::vector<Tensor> wholes;  // gradients of cut parameters in their global shape
  std::vector<TensorView> views;
  for (const Parameter* parameter : tensor_summed_) {
    if (parameter->gradient->shape == parameter->global_shape) {
      views.push_back(parameter->gradient);
    } else {
      wholes.push_back(whole_of(*parameter, parameter->gradient));
      views.push_back(wholes.back());
    }
  }
  all_reduce_in_buckets(mesh_.axis(Axis::kTensor), views, bucket_bytes_, {.verb = "gradient_tensor"});
  for (std::size_t i = 0; i < views.size(); ++i) {
    const Parameter& parameter = *tensor_summed_[i];
    if (views[i].data != parameter.gradient->data) copy(held_of(parameter, views[i]), parameter.gradient);
  }
}

double GradientSync::squared_norm_share() const {
  if (shares_.parts() == 1 && mesh_.replicas().rank() != 0) return 0;
  return squared_norm(own());
}

}  // namespace dattn
