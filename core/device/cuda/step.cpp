// Steps as graphs (see step.h).
#include "core/device/cuda/step.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/base/error.h"
#include "core/device/cuda/language.h"

namespace dattn::cuda {
namespace {

enum class Pass { kDirect, kCapture, kAgain };

struct Room {
  void* memory;
  std::size_t bytes;
};

struct Step {
  Pass pass = Pass::kDirect;
  bool warm = false;  // a pass has been
  std::vector<std::int64_t> key;
  cudaGraphExec_t graph = nullptr;
  std::vector<Room> rooms;  // in the order of the copies
  std::size_t used = 0;     // by this pass
  NativeEvent done = make_event();

  Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
  ~Step() {
    try {
      forget();
    } catch (const Error&) {
      // The device is lost, and its memory with it.
    }
    destroy_event(done);
  }

  // When the last launch has read what it reads.
  void forget() {
    synchronize_event(done);
    if (graph != nullptr && cudaGraphExecDestroy(graph) != cudaSuccess) cudaGetLastError();
    graph = nullptr;
    for (const Room& room : rooms) free_pinned(room.memory);
    rooms.clear();
  }
};

thread_local Step* t_step = nullptr;  // whose pass this thread runs

void launch_graph(Step& step, cudaStream_t stream) {
  check(cudaGraphLaunch(step.graph, stream), "cudaGraphLaunch");
  record(step.done, stream);
}

void finish_capture(Step& step, cudaStream_t stream) {
  cudaGraph_t captured = nullptr;
  check(cudaStreamEndCapture(stream, &captured), "cudaStreamEndCapture");
  const cudaError_t made = cudaGraphInstantiate(&step.graph, captured, 0);
  if (cudaGraphDestroy(captured) != cudaSuccess) cudaGetLastError();
  check(made, "cudaGraphInstantiate");
}

}  // namespace

bool only_host() { return t_step != nullptr && t_step->pass == Pass::kAgain; }

bool in_step() { return t_step != nullptr && t_step->pass != Pass::kDirect; }

void* step_room(std::size_t bytes) {
  ensure(in_step(), "room of a step outside of one");
  Step& step = *t_step;
  if (step.pass == Pass::kCapture) step.rooms.push_back({allocate_pinned(bytes), bytes});
  ensure(step.used < step.rooms.size() && step.rooms[step.used].bytes == bytes,
         "copy {} of a step has {} bytes, of {} copies when it was captured with the same key", step.used, bytes,
         step.rooms.size());
  return step.rooms[step.used++].memory;
}

void* make_step() { return new Step; }

void destroy_step(void* step) noexcept { delete static_cast<Step*>(step); }

bool begin_step(void* handle, std::span<const std::int64_t> key, NativeStream stream) {
  Step& step = *static_cast<Step*>(handle);
  ensure(t_step == nullptr, "a step within a step");
  const bool again = step.graph != nullptr && std::equal(key.begin(), key.end(), step.key.begin(), step.key.end());
  step.used = 0;
  step.pass = again ? Pass::kAgain : step.warm && stream != nullptr ? Pass::kCapture : Pass::kDirect;
  if (again) synchronize_event(step.done);  // it reads the pinned memory that is written now
  if (step.pass == Pass::kCapture) {
    step.forget();
    step.key.assign(key.begin(), key.end());
    // Relaxed: libraries may load and allocate what they have not yet.
    check(cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  }
  t_step = &step;
  return again;
}

void end_step(void* handle, NativeStream stream) {
  Step& step = *static_cast<Step*>(handle);
  const auto native = static_cast<cudaStream_t>(stream);
  t_step = nullptr;
  step.warm = true;
  if (step.pass == Pass::kCapture) finish_capture(step, native);
  if (step.pass == Pass::kDirect) return;
  ensure(step.used == step.rooms.size(), "a step made {} copies from the host, {} when it was captured with the same key",
         step.used, step.rooms.size());
  launch_graph(step, native);
}

// After an exception: what was captured so far is forgotten.
void abandon_step(void* handle, NativeStream stream) noexcept {
  Step& step = *static_cast<Step*>(handle);
  t_step = nullptr;
  cudaGraph_t captured = nullptr;
  if (step.pass == Pass::kCapture) {
    if (cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &captured) != cudaSuccess) cudaGetLastError();
    if (captured != nullptr && cudaGraphDestroy(captured) != cudaSuccess) cudaGetLastError();
  }
}

}  // namespace dattn::cuda
