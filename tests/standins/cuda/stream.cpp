#include "stream.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include <climits>

#include "memory.h"

using namespace dattn::cuda::standin;  // NOLINT: the types below are named by CUDA

namespace dattn::cuda::standin {
namespace {

void start_thread(void* (*main)(void*), void* argument) {
  pthread_t thread;
  if (pthread_create(&thread, nullptr, main, argument) != 0) {
    std::fputs("CUDA stand-in: no more threads\n", stderr);
    std::abort();
  }
  pthread_detach(thread);
}

void wait_for(sem_t& semaphore) {
  while (sem_wait(&semaphore) != 0) {
  }
}

// 0: no delays.
unsigned jitter_seed() {
  static const unsigned seed = [] {
    const char* text = std::getenv("DATTN_CUDA_STANDIN_JITTER");
    return text == nullptr ? 0u : static_cast<unsigned>(std::atoi(text));
  }();
  return seed;
}

struct Fault {
  cudaError_t error = cudaSuccess;
  const char* text = "";
  int device = -1;
  int kernel = 0;
};

const Fault& fault() {
  static const Fault told = [] {
    Fault made;
    char kind[16] = "";
    const char* text = std::getenv("DATTN_CUDA_STANDIN_FAULT");
    if (text == nullptr || std::sscanf(text, "%15s %d %d", kind, &made.device, &made.kernel) != 3) return Fault{};
    const std::string name = kind;
    if (name == "ecc") made.error = cudaErrorECCUncorrectable, made.text = "uncorrectable ECC error encountered";
    if (name == "address") made.error = cudaErrorIllegalAddress, made.text = "an illegal memory access was encountered";
    if (name == "launch") made.error = cudaErrorLaunchFailure, made.text = "unspecified launch failure";
    return made;
  }();
  return told;
}

std::atomic<const Failure*> g_lost{nullptr};  // of the fault's device
std::atomic<int> g_kernels{0};                // run on it

}  // namespace

const Failure* lost(int device) { return device == fault().device ? g_lost.load(std::memory_order_relaxed) : nullptr; }

// Futexes by hand: what the standard library offers orders the waiting thread before the waking one for ThreadSanitizer.
void Progress::reach(std::uint32_t value) {
  std::uint32_t seen = value_.load(std::memory_order_relaxed);
  while (static_cast<std::int32_t>(seen - value) < 0 &&
         !value_.compare_exchange_weak(seen, value, std::memory_order_release, std::memory_order_relaxed)) {
  }
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&value_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

bool Progress::reached(std::uint32_t value) const {
  return static_cast<std::int32_t>(value_.load(std::memory_order_acquire) - value) >= 0;
}

void Progress::wait_for(std::uint32_t value) {
  while (!reached(value)) {
    const std::uint32_t seen = value_.load(std::memory_order_relaxed);
    if (static_cast<std::int32_t>(seen - value) >= 0) continue;
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&value_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  }
}

Helper::Helper() {
  sem_init(&begun_, 0, 0);
  sem_init(&done_, 0, 0);
  start_thread(&Helper::main, this);
}

Helper::~Helper() {
  work_ = nullptr;
  sem_post(&begun_);
  wait_for(done_);
}

void Helper::begin(const std::function<void()>& work) {
  work_ = &work;
  sem_post(&begun_);
}

void Helper::finish() { wait_for(done_); }

void* Helper::main(void* self) {
  auto& helper = *static_cast<Helper*>(self);
  while (true) {
    wait_for(helper.begun_);
    const auto* work = helper.work_;
    if (work != nullptr) (*work)();
    sem_post(&helper.done_);
    if (work == nullptr) return nullptr;
  }
}

const Failure* keep(Failure failure) {
  static std::atomic<const Failure*> all{nullptr};
  auto* kept = new Failure(std::move(failure));
  kept->before = all.load(std::memory_order_relaxed);
  while (!all.compare_exchange_weak(kept->before, kept, std::memory_order_release, std::memory_order_relaxed)) {
  }
  return kept;
}

cudaError_t start(Launch launch, cudaStream_t handle) {
  CUstream_st& stream = *CUstream_st::of(handle);
  const std::uint64_t threads = std::uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024 || launch.grid.y > 65535 || launch.grid.z > 65535 || launch.grid.x > INT_MAX) {
    return report(cudaErrorInvalidConfiguration, "a block of " + std::to_string(threads) + " threads, a grid of " +
                                                     std::to_string(launch.grid.x) + " x " + std::to_string(launch.grid.y) +
                                                     " x " + std::to_string(launch.grid.z) + " blocks");
  }
  if (launch.shared_bytes > kMaxSharedBytes) {
    return report(cudaErrorInvalidValue, std::to_string(launch.shared_bytes) + " bytes of shared memory; a block has at most " +
                                             std::to_string(kMaxSharedBytes));
  }
  if (stream.device() != current_device()) {
    return report(cudaErrorInvalidResourceHandle, "a kernel for device " + std::to_string(current_device()) +
                                                      " on a stream of device " + std::to_string(stream.device()));
  }
  if (const cudaError_t error = report_lost()) return error;
  stream.push([launch = std::move(launch), &stream] { stream.run_grid(launch); });
  return cudaSuccess;
}

}  // namespace dattn::cuda::standin

struct CUstream_st::Work {
  std::function<void()> run;  // empty: the end
  bool counts = false;
  Work* next = nullptr;
};

// Freed memory, filled with what must still be there when it goes back.
struct CUstream_st::Retired {
  void* memory;
  std::size_t bytes;
  Retired* next = nullptr;
};

CUstream_st::CUstream_st(int device) : device_(device) {
  static std::atomic<unsigned> count{0};
  jitter_.seed(jitter_seed() + 7919 * count.fetch_add(1, std::memory_order_relaxed));
  sem_init(&count_, 0, 0);
  start_thread(&CUstream_st::main, this);
}

CUstream_st::~CUstream_st() {
  while (oldest_ != nullptr) release_oldest();
}

CUstream_st* CUstream_st::of(cudaStream_t stream) {
  if (stream != nullptr) return stream;
  static std::mutex mutex;
  static auto* own = new std::vector<CUstream_st*>;
  const std::lock_guard lock(mutex);
  const auto device = static_cast<std::size_t>(current_device());
  if (own->size() <= device) own->resize(device + 1);
  if ((*own)[device] == nullptr) (*own)[device] = new CUstream_st(static_cast<int>(device));
  return (*own)[device];
}

// The host releases and the worker acquires, never the reverse.
void CUstream_st::push(std::function<void()> work, bool counts) {
  if (capture != nullptr) return capture->work.push_back(std::move(work));
  if (counts) given_.fetch_add(1, std::memory_order_relaxed);
  auto* item = new Work{std::move(work), counts, pushed_.load(std::memory_order_relaxed)};
  while (!pushed_.compare_exchange_weak(item->next, item, std::memory_order_release, std::memory_order_relaxed)) {
  }
  sem_post(&count_);
}

CUstream_st::Work* CUstream_st::next() {
  wait_for(count_);
  if (taken_ == nullptr) {
    for (Work* item = pushed_.exchange(nullptr, std::memory_order_acquire); item != nullptr;) {
      Work* const older = item->next;
      item->next = taken_;
      taken_ = item;
      item = older;
    }
  }
  Work* const item = taken_;
  taken_ = item->next;
  return item;
}

void* CUstream_st::main(void* self) {
  const std::unique_ptr<CUstream_st> stream(static_cast<CUstream_st*>(self));
  stream->run();
  return nullptr;
}

void CUstream_st::run() {
  while (true) {
    const std::unique_ptr<Work> work(next());
    if (!work->run) return;
    delay();
    work->run();
    if (work->counts) done_.fetch_add(1, std::memory_order_release);
  }
}

void CUstream_st::delay() {
  if (jitter_seed() == 0) return;
  const auto roll = jitter_();
  if (roll % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(roll / 3 % 200));
}

void CUstream_st::finish() { push({}); }

void CUstream_st::synchronize() {
  Progress progress;
  push([&progress] { progress.reach(1); }, false);
  progress.wait_for(1);
}

bool CUstream_st::idle() const { return done_.load(std::memory_order_acquire) >= given_.load(std::memory_order_relaxed); }

const Failure* CUstream_st::take_failure() {
  const Failure* const taken = failure.exchange(nullptr);
  const Failure* const always = lost(device_);
  return always != nullptr ? always : taken;
}

void CUstream_st::run_grid(const Launch& launch) {
  if (device_ == fault().device && g_kernels.fetch_add(1, std::memory_order_relaxed) == fault().kernel) {
    g_lost.store(keep({fault().error, fault().text}), std::memory_order_relaxed);
  }
  if (lost(device_) != nullptr) return;
  const std::uint64_t blocks = std::uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  std::atomic<std::uint64_t> next_block{0};
  std::atomic<const Failure*> failed{nullptr};
  const std::function<void()> run = [&] {
    while (failed.load(std::memory_order_relaxed) == nullptr) {
      const std::uint64_t block = next_block.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks) return;
      std::string why = run_block(launch, block);
      if (!why.empty()) failed.store(keep({cudaErrorLaunchFailure, std::move(why)}), std::memory_order_release);
    }
  };
  constexpr std::uint64_t kWorthAThread = 16;
  const bool helped = blocks >= kWorthAThread;
  if (helped) {
    if (!helper_) helper_ = std::make_unique<Helper>();
    helper_->begin(run);
  }
  run();
  if (helped) helper_->finish();
  const Failure* mine = failed.load(std::memory_order_acquire);
  const Failure* none = nullptr;
  if (mine != nullptr) failure.compare_exchange_strong(none, mine);  // the first is what counts
}

void CUstream_st::retire(void* memory, std::size_t bytes) {
  constexpr std::size_t kKeep = std::size_t{32} << 20;
  std::memset(memory, kFreed, bytes);
  auto* entry = new Retired{memory, bytes};
  (newest_ == nullptr ? oldest_ : newest_->next) = entry;
  newest_ = entry;
  retired_bytes_ += bytes;
  poison_freed(memory, bytes);
  while (retired_bytes_ > kKeep) release_oldest();
}

void CUstream_st::release_oldest() {
  const std::unique_ptr<Retired> entry(oldest_);
  oldest_ = entry->next;
  if (oldest_ == nullptr) newest_ = nullptr;
  retired_bytes_ -= entry->bytes;
  unpoison_freed(entry->memory, entry->bytes);
  const auto* bytes = static_cast<const unsigned char*>(entry->memory);
  const auto* end = bytes + entry->bytes;
  const auto* changed = std::find_if(bytes, end, [](unsigned char byte) { return byte != kFreed; });
  if (changed != end) {
    const Failure* none = nullptr;
    failure.compare_exchange_strong(
        none, keep({cudaErrorLaunchFailure, "byte " + std::to_string(changed - bytes) + " of " + std::to_string(entry->bytes) +
                                                " was written after cudaFreeAsync"}));
  }
  release_device_memory(entry->memory);
}
