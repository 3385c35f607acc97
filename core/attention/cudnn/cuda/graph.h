// One attention graph of cuDNN, forward or backward, planned for one shape and run many times. Three files define what is
// declared here: cudnn.cpp by cuDNN's front end, no_cudnn.cpp where its headers are missing, and the tests' stand-in on host
// memory (tests/standins/cudnn).
//
// Tensors, storage bf16 or fp16: q, out, dout, dq [B, S, H, .], k, v, dk, dv [B, T, K, .], bias [B or 1, S, H or 1, T]; stats
// [B, H, S], fp32, contiguous: natural logarithms of the sums of exponentials. out of a forward graph and all gradients are
// contiguous. Results in other types are not tried: cuDNN 9.19 plans backward graphs with gradients of fp32, but of int32 as
// well, so that a plan is no evidence that its kernel writes the type.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "core/base/dtype.h"

namespace dattn::cudnn {

struct Strides {  // in elements; those of `dim` are 1
  std::int64_t batch = 0, row = 0, head = 0;
  auto operator<=>(const Strides&) const = default;  // NOLINT: clang-tidy 14 takes its 0 for a pointer
};

// All that a plan depends on.
struct GraphProblem {
  bool backward = false;
  DType storage = DType::kBF16;  // or kF16
  bool deterministic = false;    // backward: the same bits from run to run
  std::int64_t batch = 1, rows = 1, keys = 1, heads = 1, kv_heads = 1, dim_qk = 1, dim_v = 1;
  std::optional<std::int64_t> left, right;  // Band (core/attention/cudnn/calls.h)
  double scale = 1.0;
  Strides q, k, v;
  Strides dout;  // backward: of dout and out
  bool has_bias = false;
  std::int64_t bias_batch = 1, bias_heads = 1;
  Strides bias;
  auto operator<=>(const GraphProblem&) const = default;  // NOLINT: as above
};

struct Buffers {
  void *q = nullptr, *k = nullptr, *v = nullptr, *bias = nullptr;
  void *out = nullptr, *stats = nullptr;  // written forward, read backward
  void *dout = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;
};

// Where a plan is to run: a device of this machine, or one that is only described (CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION).
struct Target {
  int device = 0;
  int compute_capability = 0;   // 90; only with `properties`
  std::string properties = {};  // JSON
};

class GraphPlan {
 public:
  virtual ~GraphPlan() = default;
  virtual std::int64_t workspace_bytes() const = 0;
  // In order on `stream` (cudaStream_t) of the plan's device. Callable from several threads. Throws Error(kSystem).
  virtual void run(const Buffers& buffers, void* workspace, void* stream) const = 0;
};

struct Planned {
  std::unique_ptr<const GraphPlan> plan;
  std::string why;  // cuDNN's words where there is none
};

Planned make_plan(const GraphProblem& problem, const Target& target);  // takes about a second

// Is there a library to plan with? Empty, or what is missing.
std::string missing();
std::string version();  // of that library, as "9.19.0"; empty where there is none

}  // namespace dattn::cudnn
