// A machine for tests: everything costs nothing but what a test makes cost something.
#pragma once

#include "parallel/machine.h"
#include "parallel/strategy.h"

namespace dattn {

inline Machine free_machine(int ranks_per_node = 1024) {
  constexpr double kFast = 1e30;
  Machine machine;
  machine.ranks_per_node = ranks_per_node;
  machine.memory_bytes = std::int64_t{1} << 40;
  machine.flops = {kFast, kFast};
  machine.attend_of_peak = machine.attend_grad_of_peak = 1;
  machine.memory_bandwidth = kFast;
  machine.links.inside = {0, kFast, std::nullopt};
  machine.links.between = machine.links.inside;
  return machine;
}

inline MeshShape mesh_of(int ring, int ulysses = 1) {
  MeshShape mesh;
  mesh.set(Axis::kRing, ring);
  mesh.set(Axis::kUlysses, ulysses);
  return mesh;
}

// One batch row, 4 query and 4 KV heads of dim 16, fp32.
inline Plan plan_of(const std::string& strategy, const MeshShape& mesh, std::int64_t seq, const Mask& mask = Mask::full()) {
  AttentionOptions options;
  options.strategy = strategy;
  options.mask = mask;
  return make_plan(mesh, {1, seq, seq, 4, 4, 16, 16, DType::kF32}, options);
}

}  // namespace dattn
