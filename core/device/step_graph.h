// A step that is taken many times with other numbers: on a CUDA device one launch of a graph (core/device/cuda/step.h),
// elsewhere a call.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

namespace dattn {

class StepGraph {
 public:
  StepGraph() = default;
  ~StepGraph();
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  // Calls step() on this thread, whose stream then holds its work. Calls with equal keys must put equal work there, at the same
  // addresses, but for what they copy from host memory to memory that they allocate themselves; tensors that step() makes end
  // with it, and it reads nothing back.
  void run(std::span<const std::int64_t> key, const std::function<void()>& step);

  std::int64_t replays() const { return replays_; }  // calls that were a launch of the graph

 private:
  void* native_ = nullptr;
  std::int64_t replays_ = 0;
};

}  // namespace dattn
