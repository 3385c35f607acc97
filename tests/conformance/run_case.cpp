// One case: the sharded call, forward and backward, against the reference kernel on the whole tensors.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "parallel/comm/decorators.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"
#include "tests/conformance/expected.h"
#include "tests/parallel/plan_run.h"

namespace dattn::conformance {
namespace {

// |got - want| / |want| over all elements, both read as fp64. Where the right answer is (nearly) zero by cancellation, as
// in the gradient of a row that sees one key, the error may be taken as relative to a quarter of the size of the terms that
// cancel: `terms` products of unit size in each element; 0: it is not.
double relative_error(const TensorView& got, const TensorView& want, std::int64_t terms) {
  const Tensor a = to_dtype(got, DType::kF64), b = to_dtype(want, DType::kF64);
  double difference = 0, norm = 0;
  for (std::int64_t i = 0; i < a->elements(); ++i) {
    const double x = a.ptr<double>()[i], y = b.ptr<double>()[i];
    if (std::isinf(y) && x == y) continue;
    if (!std::isfinite(x) || !std::isfinite(y)) return INFINITY;
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  if (difference == 0) return 0;
  return std::sqrt(difference / std::max(norm, 0.0625 * static_cast<double>(a->elements() * terms)));
}

bool is_zero(const TensorView& tensor) {
  const Tensor all = to_dtype(tensor, DType::kF64);
  return std::all_of(all.ptr<double>(), all.ptr<double>() + all->elements(), [](double element) { return element == 0; });
}

// What one rounding to the type is off by, as a root mean square.
double rounding_to(DType type) { return type == DType::kBF16 ? 0x1p-9 : 0x1p-12; }

// Empty where the error is at most
//   fp32: 2e-6 times `loss`; of the terms that cancel, where one rank's kernel is not well inside that, or is not there
//   fp64: 1e-12 of them
//   bf16 and fp16: 1.5 times that of the kernel on one rank, which counts as `roundings` roundings where it is less, by luck or
//   by cancellation in tensors of few elements.
std::string compare(const char* name, const TensorView& got, const TensorView& want, const TensorView& one_rank, DType storage,
                    double loss, std::int64_t terms = 1, double roundings = 1) {
  double allowed = storage == DType::kF64 ? 1e-12 : 2e-6 * loss;
  if (is_half(storage) && one_rank.data != nullptr)
    allowed = 1.5 * std::max(relative_error(one_rank, want, terms), roundings * rounding_to(storage));
  if (storage == DType::kF32 && one_rank.data != nullptr) {
    const bool few = want.shape.elements() < 1000;  // whose errors are near the bound or far from it by luck
    const bool cancels = few || is_zero(want) || relative_error(one_rank, want, 0) > allowed / 4;
    if (!cancels) terms = 0;
  }
  const double error = relative_error(got, want, terms);
  return error <= allowed ? "" : fmt::format("{}: relative error {:.3e}, allowed {:.3e}\n", name, error, allowed);
}

// What fp32 loses in probabilities of large scores: a score and lse of n are held to n 2^-24, and exp makes that relative. 1
// where lse stays below 10, more than the logarithm of ten thousand keys of unit scores.
double loss_of(const TensorView& lse) {
  double most = 0;
  const Tensor all = to_dtype(lse, DType::kF64);
  for (std::int64_t i = 0; i < all->elements(); ++i) {
    if (const double value = std::abs(all.ptr<double>()[i]); std::isfinite(value)) most = std::max(most, value);
  }
  return most < 10 ? 1 : most / 4;
}

// Roundings that a result may show where the one-rank kernel happens to show fewer. Gradients follow from out by delta, in
// which a row's errors add up. Of shares that are combined, out is rounded twice: to travel, and as a whole. A quarter more is
// what small tensors of few numbers a row were seen to need.
double roundings_of(const Plan& forward, bool gradient) {
  const auto combines = [](const Step& step) { return step.verb == Verb::kCombine; };
  const bool twice = std::any_of(forward.steps.begin(), forward.steps.end(), combines);
  return gradient ? (twice ? 3.75 : 2.5) : (twice ? 2 : 1.25);
}

std::string check_bytes(const Plan& plan, int rank, const ByteCounter& counter, const char* which) {
  const RankCost cost = make_rank_plan(plan, rank).cost;
  const std::int64_t counted = counter.total().received;
  if (counted == cost.bytes_received + cost.stats_bytes) return {};
  return fmt::format("{}: the plan says {} bytes and {} of statistics, the transport counted {}\n", which, cost.bytes_received,
                     cost.stats_bytes, counted);
}

// What a runner holds, kernels apart, is what the plan promises to the byte.
std::string check_memory(const Plan& plan, const Mesh& mesh, const char* which) {
  const RankPlan mine = make_rank_plan(plan, mesh.rank());
  const PlanInputs inputs(plan, mine);
  const NoKernel kernel;
  Runner runner(plan, mine, mesh, kernel);
  const TensorMeter meter;
  runner.run(inputs.views, {});
  if (meter.peak() == mine.cost.peak_memory && meter.now() == 0) return {};
  return fmt::format("{}: the plan promises {} bytes of memory, the runner held {} and leaves {}\n", which,
                     mine.cost.peak_memory, meter.peak(), meter.now());
}

std::string check_plan(const Plan& plan, const char* which) {
  std::string all;
  for (const std::string& problem : verify(plan).problems) all += fmt::format("{} plan: {}\n", which, problem);
  return all;
}

}  // namespace

std::string run_case(const Case& one, Communicator& world) {
  const AttentionOptions options = options_of(one);
  const auto counter = std::make_shared<ByteCounter>();
  std::vector<int> everyone(static_cast<std::size_t>(world.size()));
  for (int i = 0; i < world.size(); ++i) everyone[static_cast<std::size_t>(i)] = i;
  const auto counting = counted(world.split(everyone, "conformance"), counter);
  const Mesh mesh(*counting, one.mesh);
  const Device device = current_device();
  const DeviceScope host(Device{});
  const auto whole = expected(one, mesh.coordinate(Axis::kTensor));
  const Expected& e = *whole;
  auto attention = [&] {
    const DeviceScope scope(device);
    return ShardedAttention(mesh, one.shape, options);
  }();
  const Positions &q_rows = attention.q_positions(), &kv_rows = attention.kv_positions();
  const HeadRange heads = attention.heads();

  const ShardInputs in = shard_inputs(e, one.shape, {0, one.shape.batch}, attention, device);
  const Plan forward = make_plan(one.mesh, one.shape, options), gradient = backward(forward);
  std::string problems = world.rank() == 0 ? check_plan(forward, "forward") + check_plan(gradient, "backward") : "";

  AttentionResult result;
  AttentionGradients gradients;
  {
    const DeviceScope scope(device);
    counter->reset();
    result = attention.forward(in.q, in.k, in.v, in.call);
    problems += check_bytes(forward, world.rank(), *counter, "forward");
    counter->reset();
    gradients = attention.backward(in.q, in.k, in.v, result, in.dout, in.call);
    problems += check_bytes(gradient, world.rank(), *counter, "backward");
    problems += check_memory(forward, mesh, "forward") + check_memory(gradient, mesh, "backward");
  }
  bring_to_host(result, gradients);

  const double loss = loss_of(e.exact.lse);
  const auto check = [&](const char* name, const TensorView& got, Tensor Results::*field, const Positions& rows, Interval part,
                         std::int64_t terms = 1) {
    const TensorView &exact = e.exact.*field, &one_rank = e.one_rank.*field;
    const Tensor alone = one_rank.data != nullptr ? shard_of(one_rank, rows, part) : Tensor();
    problems += compare(name, got, shard_of(exact, rows, part), alone, one.shape.dtype, loss, terms,
                        roundings_of(forward, field != &Results::out));
  };
  const Interval local_q{0, heads.q.count()};
  check("out", result.out, &Results::out, q_rows, local_q);
  const std::int64_t products = is_half(one.shape.dtype) ? 1 : std::max<std::int64_t>(1, one.shape.dim_v);  // of dP, less delta
  check("dq", gradients.dq, &Results::dq, q_rows, local_q, products);
  const std::int64_t rows_a_key = std::max<std::int64_t>(1, one.shape.seq_q / std::max<std::int64_t>(1, one.shape.seq_kv)) *
                                  (one.shape.heads / one.shape.kv_heads);
  check("dk", gradients.dk, &Results::dk, kv_rows, heads.kv, rows_a_key * products);  // of one key alone: a sum of what cancels
  check("dv", gradients.dv, &Results::dv, kv_rows, heads.kv);
  if (one.shape.bias) check("dbias", gradients.dbias, &Results::dbias, q_rows, {0, e.exact.dbias->size(2)}, one.shape.dim_v);
  const auto lse_of = [&](const Results& r) { return r.lse.defined() ? shard_of(as_rows(r.lse), q_rows, local_q) : Tensor(); };
  const DType sums = accumulate_type(one.shape.dtype);  // never rounded to storage
  if (is_half(one.shape.dtype)) {  // whose exp is good to 2e-6, of which one rank shows more or less by luck
    problems += compare("lse", as_rows(result.lse), lse_of(e.exact), {}, sums, 2 * loss);
  } else {
    problems += compare("lse", as_rows(result.lse), lse_of(e.exact), lse_of(e.one_rank), sums, loss);
  }
  if (one.shape.sink) {
    mesh.sequence().all_reduce_sum(gradients.dsink, {"conformance"});
    // In fp32 one number a head, of which all rows' terms cancel, is near or far by luck.
    const TensorView one_rank = is_half(one.shape.dtype) ? e.one_rank.dsink.view() : TensorView();
    problems += compare("dsink", gradients.dsink, e.exact.dsink, one_rank, one.shape.dtype, loss,
                        one.shape.batch * one.shape.seq_q * one.shape.dim_v, roundings_of(forward, true));
  }
  return problems.empty() ? "" : fmt::format("rank {}: {}\n{}", world.rank(), one.text(), problems);
}

}  // namespace dattn::conformance
