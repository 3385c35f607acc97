#include "core/nn/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <vector>

#include "core/base/error.h"
#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kBlock = 16384;  // elements of one block

DATTN_VECTORIZED double sum_of_squares(const float* x, std::int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

// The gradients of the run that this part of the model owns. What is cut over columns is owned where it is held.
TensorView owned_of(const ParameterRun& run) {
  const Parameter& p = *run.parameter;
  if (p.owned == p.held) return run.of(p.gradient);
  ensure(p.cut_axis == 0, "{}: owned and held columns differ", p.name);
  const std::int64_t row = p.held.count() == 0 ? 0 : p.elements() / p.held.count();
  const std::int64_t begin = std::max(run.elements.begin, (p.owned.begin - p.held.begin) * row);
  const std::int64_t end = std::min(run.elements.end, (p.owned.end - p.held.begin) * row);
  return ParameterRun{run.parameter, {begin, std::max(begin, end)}}.of(p.gradient);
}

double squares_on_host(const TensorView& view) {
  std::vector<double> blocks(static_cast<std::size_t>(div_up(view.elements(), kBlock)));
  parallel_blocks(view.elements(), kBlock, [&](std::int64_t begin, std::int64_t end) {
    blocks[static_cast<std::size_t>(begin / kBlock)] = sum_of_squares(view.ptr<float>() + begin, end - begin);
  });
  return std::accumulate(blocks.begin(), blocks.end(), 0.0);
}

using Update = AdamWUpdate;

// m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; x = x decay - rate (m / c1) / (sqrt(v / c2) + epsilon)
DATTN_VECTORIZED void update_block(const Update& u, const float* __restrict gradient, float* __restrict m, float* __restrict v,
                                   float* __restrict value, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = gradient[i] * u.gradient_scale;
    m[i] = u.beta1 * m[i] + (1.0f - u.beta1) * g;
    v[i] = u.beta2 * v[i] + (1.0f - u.beta2) * g * g;
    value[i] = value[i] * u.decay - u.rate * (m[i] * u.correction1) / (fast_sqrt(v[i] * u.correction2) + u.epsilon);
  }
}

}  // namespace

double squared_norm(std::span<const ParameterRun> runs) {
  std::vector<TensorView> owned;
  for (const ParameterRun& run : runs) {
    if (const TensorView view = owned_of(run); view.elements() > 0) owned.push_back(view);
  }
  const auto count = static_cast<std::int64_t>(owned.size());
  if (count == 0) return 0.0;
  const bool on_device = on_cuda({&owned[0]});
  Tensor sums = Tensor::uninitialized(DType::kF64, {count});
  for (std::int64_t i = 0; i < count; ++i) {
    const TensorView& view = owned[static_cast<std::size_t>(i)];
    if (on_device)
      cuda_nn().squared_norm(view, sums->slice(0, i, 1), cuda_stream());
    else
      sums->at<double>(i) = squares_on_host(view);
  }
  if (on_device) sums = to_device(sums, Device{});
  return std::accumulate(sums.ptr<double>(), sums.ptr<double>() + count, 0.0);
}

double clip_factor(double norm, double max_norm) { return max_norm > 0.0 && norm > max_norm ? max_norm / norm : 1.0; }

void validate(const Schedule& schedule) {
  require(schedule.kind == "cosine" || schedule.kind == "linear" || schedule.kind == "constant",
          "the schedule is '{}'; it is one of cosine, linear, constant", schedule.kind);
  require(schedule.warmup >= 0, "the warm-up has {} steps; it must be at least 0", schedule.warmup);
}

double learning_rate(const Schedule& schedule, std::int64_t step) {
  validate(schedule);
  const std::int64_t warmup = std::min(schedule.warmup, schedule.steps);
  if (step < warmup) return schedule.peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  if (schedule.kind == "constant") return schedule.peak;
  const double past =
      static_cast<double>(step - warmup) / static_cast<double>(std::max<std::int64_t>(1, schedule.steps - warmup));
  const double progress = std::clamp(past, 0.0, 1.0);
  const double left = schedule.kind == "linear" ? 1.0 - progress : 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
  return schedule.floor + (schedule.peak - schedule.floor) * left;
}

AdamW::AdamW(std::span<const ParameterRun> runs, const AdamWOptions& options) : options_(options) {
  for (const ParameterRun& run : runs) {
    const Shape shape{run.elements.count()};
    moments_.push_back({run, Tensor(DType::kF32, shape), Tensor(DType::kF32, shape)});
  }
}

void AdamW::step(double learning_rate, double gradient_scale) {
  ++steps_;
  const auto steps = static_cast<double>(steps_);
  Update update{};
  update.gradient_scale = static_cast<float>(gradient_scale);
  update.beta1 = static_cast<float>(options_.beta1);
  update.beta2 = static_cast<float>(options_.beta2);
  update.correction1 = static_cast<float>(1.0 / (1.0 - std::pow(options_.beta1, steps)));
  update.correction2 = static_cast<float>(1.0 / (1.0 - std::pow(options_.beta2, steps)));
  update.epsilon = static_cast<float>(options_.epsilon);
  update.rate = static_cast<float>(learning_rate);
  for (Moments& state : moments_) {
    const Parameter& p = *state.run.parameter;
    const TensorView gradient = state.run.of(p.gradient), value = state.run.of(p.value);
    update.decay = p.decays ? static_cast<float>(1.0 - learning_rate * options_.weight_decay) : 1.0f;
    if (on_cuda({&gradient, &value, &state.m.view(), &state.v.view()})) {
      cuda_nn().adamw(update, gradient, state.m, state.v, value, cuda_stream());
      continue;
    }
    parallel_blocks(value.elements(), kBlock, [&](std::int64_t begin, std::int64_t end) {
      update_block(update, gradient.ptr<float>() + begin, state.m.ptr<float>() + begin, state.v.ptr<float>() + begin,
                   value.ptr<float>() + begin, end - begin);
    });
  }
}

}  // namespace dattn
