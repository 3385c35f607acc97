// Streams and events of the stand-in. Only events and synchronisation order the work of two streams, for ThreadSanitizer too:
// giving work to a stream orders what follows on the stream after what came before on the host, never the reverse.
#pragma once

#include <semaphore.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>

#include "block.h"
#include "cuda_runtime.h"
#include "graph.h"

namespace dattn::cuda::standin {

struct Failure {
  cudaError_t error;
  std::string text;
  const Failure* before = nullptr;  // the list of all, so that they count as in use
};

// A number that only grows, and can be waited for.
class Progress {
 public:
  void reach(std::uint32_t value);
  void wait_for(std::uint32_t value);
  bool reached(std::uint32_t value) const;

 private:
  std::atomic<std::uint32_t> value_{0};
};

struct EventState {
  Progress progress;
  std::atomic<std::int64_t> time_ns{0};
  std::atomic<const Failure*> failure{nullptr};
};

// A second OS thread for the blocks of large grids.
class Helper {
 public:
  Helper();
  ~Helper();
  void begin(const std::function<void()>& work);  // one at a time
  void finish();

 private:
  static void* main(void* self);
  sem_t begun_{}, done_{};
  const std::function<void()>* work_ = nullptr;
};

// Called by whoever makes a device error known: keeps the texts that cudaGetErrorString returns.
cudaError_t report(cudaError_t error, const std::string& text);
const Failure* keep(Failure failure);  // never freed, so errors can be handed about by address

int current_device();

// A device that a fault has hit is lost: nothing runs on it any more, and every call says why. nullptr: it works.
// DATTN_CUDA_STANDIN_FAULT, "ERROR DEVICE N": the N-th kernel of the device, from 0, meets it; ERROR: ecc, address or launch.
const Failure* lost(int device);
cudaError_t report_lost();  // of the current device; cudaSuccess: it works

}  // namespace dattn::cuda::standin

struct CUevent_st {
  int device;
  std::uint32_t recorded = 0;
  std::shared_ptr<dattn::cuda::standin::EventState> state = std::make_shared<dattn::cuda::standin::EventState>();
};

struct CUstream_st {
 public:
  explicit CUstream_st(int device);
  ~CUstream_st();
  CUstream_st(const CUstream_st&) = delete;
  CUstream_st& operator=(const CUstream_st&) = delete;

  static CUstream_st* of(cudaStream_t stream);  // the device's own for the null stream

  int device() const { return device_; }
  void push(std::function<void()> work, bool counts = true);
  void finish();  // destroys the stream when all its work is done
  void synchronize();
  bool idle() const;
  void run_grid(const dattn::cuda::standin::Launch& launch);
  void retire(void* memory, std::size_t bytes);         // frees device memory, late enough to see it used after that
  const dattn::cuda::standin::Failure* take_failure();  // the first since the last call, or why the device is lost

  std::atomic<const dattn::cuda::standin::Failure*> failure{nullptr};
  std::shared_ptr<dattn::cuda::standin::Capture> capture;  // while it is captured (graph.h): push() gives it the work

 private:
  struct Work;
  static void* main(void* self);
  void run();
  Work* next();
  void delay();
  void release_oldest();

  const int device_;
  std::atomic<Work*> pushed_{nullptr};  // newest first
  Work* taken_ = nullptr;               // oldest first
  sem_t count_{};
  std::atomic<std::uint64_t> given_{0}, done_{0};  // pieces of work, without those that only mark a place
  std::unique_ptr<dattn::cuda::standin::Helper> helper_;
  std::minstd_rand jitter_;
  struct Retired;
  Retired* oldest_ = nullptr;
  Retired* newest_ = nullptr;
  std::size_t retired_bytes_ = 0;
};
