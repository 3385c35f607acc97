// A call becomes bands and groups of heads (calls.h); each is one run of a plan (graph.h), which are kept by shape. Forward,
// the states of the runs are merged in fp32; backward, their gradients are added in fp32. cuDNN writes both in the storage
// type, so that each piece is rounded once more than by our own kernel: by 2^-9 of itself in bf16, 2^-12 in fp16.
#include "core/attention/cudnn/cuda/cudnn_kernel.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "core/attention/check_args.h"
#include "core/attention/cudnn/calls.h"
#include "core/attention/cudnn/cuda/graph.h"
#include "core/attention/cudnn/projection.h"
#include "core/base/error.h"
#include "core/base/log.h"
#include "core/device/cuda/language.h"
#include "core/device/cuda/runtime.h"

namespace dattn {
namespace {

using cudnn::Band;
using cudnn::Buffers;
using cudnn::GraphPlan;
using cudnn::GraphProblem;
using cudnn::HeadGroup;
using cudnn::Strides;

constexpr std::size_t kMostPlans = 256;        // a job whose shapes never repeat would only build plans
constexpr std::size_t kPointerAlignment = 16;  // bytes, of pointers and of strides: cuDNN's kernels load as much at once
// A deterministic backward graph keeps dP on some devices, bytes that grow with the square of the sequence.
constexpr std::int64_t kMostDeterministicBytes = std::int64_t{1} << 30;

// Plans by device and problem. One is built at a time, and for good.
struct Entry {
  std::unique_ptr<const GraphPlan> plan;
  std::string why;
};
const Entry& plan_of(int device, const GraphProblem& problem) {
  static std::mutex mutex;
  static auto* const plans = new std::map<std::pair<int, GraphProblem>, Entry>;  // outlives the driver's end
  static const Entry full{nullptr, fmt::format("{} shapes have a plan already", kMostPlans)};
  const std::lock_guard lock(mutex);
  const auto found = plans->find({device, problem});
  if (found != plans->end()) return found->second;
  if (plans->size() >= kMostPlans) return full;
  cudnn::Planned planned = cudnn::make_plan(problem, {.device = device});
  Entry entry{std::move(planned.plan), std::move(planned.why)};
  if (entry.plan != nullptr && problem.deterministic && entry.plan->workspace_bytes() > kMostDeterministicBytes) {
    entry = {nullptr, fmt::format("its deterministic backward needs {} bytes, more than {}", entry.plan->workspace_bytes(),
                                  kMostDeterministicBytes)};
  }
  return plans->emplace(std::pair{device, problem}, std::move(entry)).first->second;
}

// Memory of the pool until the end of the scope, in the order of the stream.
class Scratch {
 public:
  explicit Scratch(NativeStream stream) : stream_(stream) {}
  ~Scratch() {
    for (void* memory : all_) cuda::release(memory, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* bytes(std::int64_t count) {
    all_.reserve(all_.size() + 1);
    all_.push_back(cuda::allocate(static_cast<std::size_t>(std::max<std::int64_t>(count, 1)), stream_));
    return all_.back();
  }
  TensorView tensor(DType type, const Shape& shape, Device device) {
    return {bytes(shape.elements() * size_of(type)), type, shape, device};
  }

 private:
  NativeStream stream_;
  std::vector<void*> all_;
};

Strides strides_of(const TensorView& view) { return {view.stride(0), view.stride(1), view.stride(2)}; }

bool aligned(const TensorView& view) {
  const auto fits = [&](std::int64_t elements) {
    return elements * size_of(view.dtype) % static_cast<std::int64_t>(kPointerAlignment) == 0;
  };
  return reinterpret_cast<std::uintptr_t>(view.data) % kPointerAlignment == 0 && fits(view.stride(0)) && fits(view.stride(1)) &&
         fits(view.stride(2));
}

// Rows and heads of a tensor [B, S, H, .].
TensorView part(const TensorView& view, Interval rows, Interval heads) {
  return view.slice(1, rows.begin, rows.count()).slice(2, heads.begin, heads.count());
}
// Of a tensor [B, H, S].
TensorView stats_part(const TensorView& view, Interval rows, Interval heads) {
  return view.slice(1, heads.begin, heads.count()).slice(2, rows.begin, rows.count());
}

// One run: what it reads and what it is planned as.
struct Run {
  Band band;
  HeadGroup heads;
  TensorView q, k, v, bias;
  GraphProblem problem;
  const GraphPlan* plan = nullptr;
};

TensorView bias_part(const TensorView& bias, const Band& band, Interval heads) {
  const TensorView rows = part(bias, band.q, bias.size(2) == 1 ? Interval{0, 1} : heads);
  return rows.slice(3, band.k_position, band.k.count());
}

template <class Args>
Run run_of(const Args& args, const Band& band, const HeadGroup& heads) {
  Run run{band, heads, part(args.q, band.q, heads.q), part(args.k, band.k, heads.kv), part(args.v, band.k, heads.kv), {}, {}};
  GraphProblem& p = run.problem;
  p.storage = args.q.dtype;
  p.batch = args.q.size(0);
  p.rows = band.q.count();
  p.keys = band.k.count();
  p.heads = heads.q.count();
  p.kv_heads = heads.kv.count();
  p.dim_qk = args.q.size(3);
  p.dim_v = args.v.size(3);
  p.left = band.left;
  p.right = band.right;
  p.scale = args.scale;
  p.q = strides_of(run.q);
  p.k = strides_of(run.k);
  p.v = strides_of(run.v);
  if (args.terms.bias.data != nullptr) {
    run.bias = bias_part(args.terms.bias, band, heads.q);
    p.has_bias = true;
    p.bias_batch = run.bias.size(0);
    p.bias_heads = run.bias.size(2);
    p.bias = strides_of(run.bias);
  }
  return run;
}

struct Runs {
  std::vector<Run> all;
  std::string why;  // where cuDNN does not take the call
};

// The runs of a call, all planned before the first of them starts. `complete` adds what only one direction has.
template <class Args, class Complete>
Runs plan_runs(const Args& args, const Complete& complete) {
  const Support suits = cudnn::suits(args);
  if (!suits.ok) return {{}, suits.why};
  Runs runs;
  for (const Band& band : cudnn::bands_of(args.tiles, args.terms.bias.data != nullptr)) {
    for (const HeadGroup& heads : cudnn::head_groups(args.heads, args.q.size(2))) {
      Run run = run_of(args, band, heads);
      if (!aligned(run.q) || !aligned(run.k) || !aligned(run.v) || (run.problem.has_bias && !aligned(run.bias)))
        return {{}, "memory that is not aligned to 16 bytes"};
      complete(run);
      const Entry& entry = plan_of(args.q.device.index, run.problem);
      if (entry.plan == nullptr) return {{}, entry.why};
      run.plan = entry.plan.get();
      runs.all.push_back(run);
    }
  }
  return runs;
}

void start(const Run& run, Buffers buffers, Scratch& scratch, NativeStream stream) {
  buffers.q = run.q.data;
  buffers.k = run.k.data;
  buffers.v = run.v.data;
  buffers.bias = run.bias.data;
  if (!cuda::only_host()) run.plan->run(buffers, scratch.bytes(run.plan->workspace_bytes()), stream);
}

void forward(const AttendArgs& args, const std::vector<Run>& runs, NativeStream stream) {
  const auto covers = [&](const Run& run) { return run.q.size(1) == args.q.size(1) && run.q.size(2) == args.q.size(2); };
  const bool whole = !args.merge && runs.size() == 1 && covers(runs[0]);
  if (!args.merge && !whole) cuda::clear_state(args.out, args.lse, stream);
  for (const Run& run : runs) {
    Scratch scratch(stream);
    const GraphProblem& p = run.problem;
    const TensorView out = scratch.tensor(p.storage, {p.batch, p.rows, p.heads, p.dim_v}, args.q.device);
    const TensorView lse = scratch.tensor(DType::kF32, {p.batch, p.heads, p.rows}, args.q.device);
    start(run, {.out = out.data, .stats = lse.data}, scratch, stream);
    if (whole) {
      cuda::copy(out, args.out, stream);
      cuda::copy(lse, args.lse, stream);
      continue;
    }
    const TensorView wide = scratch.tensor(DType::kF32, out.shape, args.q.device);
    cuda::copy(out, wide, stream);
    cuda::merge_state(part(args.out, run.band.q, run.heads.q), stats_part(args.lse, run.band.q, run.heads.q), wide, lse,
                      stream);
  }
}

// dout of a run as cuDNN reads it: the rows of its band and heads, contiguous, beside their projection.
void backward(const AttendGradArgs& args, const std::vector<Run>& runs, NativeStream stream) {
  for (const Run& run : runs) {
    Scratch scratch(stream);
    const GraphProblem& p = run.problem;
    const Device device = args.q.device;
    const TensorView dout = part(args.dout, run.band.q, run.heads.q);
    const TensorView own_dout = scratch.tensor(p.storage, dout.shape, device);
    const TensorView out = scratch.tensor(p.storage, dout.shape, device);
    const TensorView lse = scratch.tensor(DType::kF32, {p.batch, p.heads, p.rows}, device);
    const TensorView dq = scratch.tensor(p.storage, run.q.shape, device), dk = scratch.tensor(p.storage, run.k.shape, device),
                     dv = scratch.tensor(p.storage, run.v.shape, device);
    cuda::copy(dout, own_dout, stream);
    cuda::copy(stats_part(args.lse, run.band.q, run.heads.q), lse, stream);
    cudnn::project(own_dout, stats_part(args.delta, run.band.q, run.heads.q), out, stream);
    start(run, {.out = out.data, .stats = lse.data, .dout = own_dout.data, .dq = dq.data, .dk = dk.data, .dv = dv.data},
          scratch, stream);
    if (args.dq.data != nullptr) cuda::add(dq, part(args.dq, run.band.q, run.heads.q), stream);
    if (args.dk.data == nullptr) continue;
    cuda::add(dk, part(args.dk, run.band.k, run.heads.kv), stream);
    cuda::add(dv, part(args.dv, run.band.k, run.heads.kv), stream);
  }
}

class CudnnKernel : public AttentionKernel {
 public:
  explicit CudnnKernel(const AttentionKernel& next) : next_(next) {}

  std::string_view name() const override { return "cudnn"; }

  Support supports(const AttendTraits& traits) const override {
    if (!is_half(traits.storage))
      return {false, fmt::format("it computes in bf16 and fp16, not in {}", name_of(traits.storage))};
    if (traits.dim_qk % 8 != 0 || traits.dim_v % 8 != 0 || traits.dim_qk > 256 || traits.dim_v > 256)
      return {false, fmt::format("dims {} and {} are not multiples of 8 up to 256", traits.dim_qk, traits.dim_v)};
    if (const std::string missing = cudnn::missing(); !missing.empty()) return {false, missing};
    return next_.supports(traits);  // which takes the calls that this one passes on
  }

  void attend(const AttendArgs& args) const override {
    check_args(args);
    NativeStream const stream = cuda::current_stream();
    const Runs runs = plan_runs(args, [](Run&) {});
    if (!runs.why.empty()) return pass_on(args, runs.why, "attention", &AttentionKernel::attend);
    forward(args, runs.all, stream);
  }

  void attend_grad(const AttendGradArgs& args) const override {
    check_args(args);
    NativeStream const stream = cuda::current_stream();
    const Runs runs = plan_runs(args, [&](Run& run) {
      GraphProblem& p = run.problem;
      p.backward = true;
      p.deterministic = args.repeatable;
      p.dout = {p.rows * p.heads * p.dim_v, p.heads * p.dim_v, p.dim_v};
    });
    if (!runs.why.empty()) return pass_on(args, runs.why, "the gradient of attention", &AttentionKernel::attend_grad);
    backward(args, runs.all, stream);
  }

 private:
  template <class Args>
  void pass_on(const Args& args, const std::string& why, const char* what,
               void (AttentionKernel::*run)(const Args&) const) const {
    note_once(fmt::format("{}, {} x {} rows, dims {} and {}: kernel cudnn passes it on to {}: {}", what, args.q.size(1),
                          args.k.size(1), args.q.size(3), args.v.size(3), next_.name(), why));
    (next_.*run)(args);
  }

  const AttentionKernel& next_;
};

}  // namespace

const AttentionKernel& cudnn_kernel(const AttentionKernel& next) {
  static const CudnnKernel kernel(next);
  return kernel;
}

}  // namespace dattn
