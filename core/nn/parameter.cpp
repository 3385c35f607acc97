#include "core/nn/parameter.h"

#include "core/base/philox.h"
#include "core/base/threads.h"

namespace dattn {

std::uint64_t hash_of(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char letter : text) hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001b3u;
  return hash;
}

std::vector<ParameterRun> whole_runs(std::span<Parameter* const> parameters) {
  std::vector<ParameterRun> runs;
  for (Parameter* parameter : parameters) runs.push_back({parameter, {0, parameter->elements()}});
  return runs;
}

TensorView held_of(const Parameter& parameter, const TensorView& global) {
  return global.slice(parameter.cut_axis, parameter.held.begin, parameter.held.count());
}

TensorView owned_of(const Parameter& parameter, const TensorView& local) {
  return local.slice(parameter.cut_axis, parameter.owned.begin - parameter.held.begin, parameter.owned.count());
}

Tensor whole_of(const Parameter& parameter, const TensorView& local) {
  Tensor global(local.dtype, parameter.global_shape);
  copy(local, held_of(parameter, global));
  return global;
}

void initialize(Parameter& parameter, const Initial& initial, std::uint64_t seed) {
  const DeviceScope host(Device{});
  const Tensor made = parameter.value->device.is_cuda() ? Tensor::uninitialized(DType::kF32, parameter.value->shape) : Tensor();
  const TensorView value = made.defined() ? made.view() : parameter.value.view();
  const std::int64_t rows = value.size(0), columns = rows == 0 ? 0 : value.elements() / rows;
  const std::int64_t global_columns =
      parameter.global_shape.axes == 1 ? 1 : parameter.global_shape.elements() / parameter.global_shape[0];
  const std::int64_t row_begin = parameter.cut_axis == 0 ? parameter.held.begin : 0;
  const std::int64_t column_begin = parameter.cut_axis == 1 ? parameter.held.begin : 0;
  const std::uint64_t stream = hash_of(parameter.name);
  parallel_for(rows, [&](std::int64_t row) {
    float* place = value.ptr<float>() + row * columns;
    for (std::int64_t column = 0; column < columns; ++column) {
      const auto index = static_cast<std::uint64_t>((row_begin + row) * global_columns + column_begin + column);
      place[column] = static_cast<float>(initial.value) *
                      (initial.kind == Initial::Kind::kNormal ? philox_normal(seed, stream, index) : 1.0f);
    }
  });
  if (made.defined()) copy(made, parameter.value);
}

}  // namespace dattn
