// Compiled without sanitizers: what threads share here is ordered by their taking turns.
#include "block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "switch.h"

thread_local constinit uint3 threadIdx;
thread_local constinit uint3 blockIdx;
thread_local constinit dim3 blockDim;
thread_local constinit dim3 gridDim;

namespace dattn::cuda::standin {
namespace {

constexpr std::size_t kMaxThreads = 1024;   // of a block
constexpr std::size_t kBeside = 1024;       // bytes watched on either side of a block's shared memory
constexpr unsigned char kUnwritten = 0xff;  // NaN as fp32, fp64 and bf16

// What a thread waits at; nullptr: nothing.
struct Wait {
  const char* what = nullptr;
  Place place{"", 0};
  bool operator==(const Wait& other) const {
    return place.line == other.place.line && same(what, other.what) && same(place.file, other.place.file);
  }
  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};

struct Thread {
  uint3 index;
  Fiber* fiber = nullptr;
  Wait wait;
  bool left = false;
  std::vector<std::pair<int, PendingCopy>> copies;  // with their group
  int group = 0;                                    // that copies are started into
};

struct Warp {
  int arrived = 0;
  Wait wait;
  void* lanes[kWarp] = {};
};

std::string block_text() { return fmt::format("block ({}, {}, {})", blockIdx.x, blockIdx.y, blockIdx.z); }

constexpr const char* kBlockBarrier = "__syncthreads";

// The most shared memory that a block can have, with room beside it.
class SharedMemory {
 public:
  SharedMemory() : memory_(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~SharedMemory() {
    unpoison(memory_, kBytes);
    munmap(memory_, kBytes);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  unsigned char* begin() const { return static_cast<unsigned char*>(memory_) + kPage; }

 private:
  static constexpr std::size_t kPage = 4096, kBytes = kMaxSharedBytes + 2 * kPage;
  void* memory_;
};

}  // namespace

class Block;
static thread_local constinit Block* t_block = nullptr;  // of this OS thread

class Block {
 public:
  Block() {  // vectors that fibers use do not grow
    fibers_.reserve(kMaxThreads + 1);
    free_.reserve(kMaxThreads + 1);
    ready_.reserve(kMaxThreads);
  }

  static Block& mine() { return *t_block; }

  std::string run(const Launch& launch, std::uint64_t number);
  void barrier(Place place);
  void meet(const char* what, Place place, void* mine, Exchange exchange);
  [[noreturn]] void give_up(std::string text);
  std::string where(const char* what, Place place) const;
  Thread& thread() { return threads_[static_cast<std::size_t>(now_)]; }
  unsigned char* shared() const { return shared_->begin(); }
  std::size_t shared_bytes() const { return launch_->shared_bytes; }

 private:
  static void fiber_main() { mine().start_threads(); }
  [[noreturn]] void start_threads();
  void prepare(const Launch& launch, std::uint64_t number);
  void run_next();  // switches to a thread that can go on, or to a fiber that starts one
  void resume(int thread);
  void release_barrier();
  [[noreturn]] void give_up_divergent();
  Fiber* free_fiber();
  std::string beside_shared() const;
  int count() const { return static_cast<int>(threads_.size()); }

  const Launch* launch_ = nullptr;
  Fiber main_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_;
  Fiber* running_ = nullptr;
  dim3 shape_{0, 0, 0};
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;  // a queue: from first_ready_ on
  std::size_t first_ready_ = 0;
  bool reverse_ = false;
  int started_ = 0, left_ = 0, at_barrier_ = 0;
  Wait barrier_wait_;
  int now_ = 0;  // the running thread
  std::unique_ptr<SharedMemory> shared_ = std::make_unique<SharedMemory>();
  std::string failure_;
};

void Block::prepare(const Launch& launch, std::uint64_t number) {
  launch_ = &launch;
  blockDim = launch.block;
  gridDim = launch.grid;
  blockIdx.x = static_cast<unsigned>(number % launch.grid.x);
  blockIdx.y = static_cast<unsigned>(number / launch.grid.x % launch.grid.y);
  blockIdx.z = static_cast<unsigned>(number / launch.grid.x / launch.grid.y);
  if (const dim3& b = launch.block; b.x != shape_.x || b.y != shape_.y || b.z != shape_.z) {
    shape_ = b;
    threads_.resize(b.x * b.y * b.z);
    for (unsigned i = 0; i < threads_.size(); ++i) threads_[i].index = {i % b.x, i / b.x % b.y, i / b.x / b.y};
  }
  for (Thread& thread : threads_) {
    thread.wait = {};
    thread.left = false;
    thread.copies.clear();
    thread.group = 0;
  }
  warps_.assign((threads_.size() + kWarp - 1) / kWarp, {});
  ready_.clear();
  first_ready_ = 0;
  reverse_ = number % 2 == 1;
  started_ = left_ = at_barrier_ = 0;
  failure_.clear();
  unpoison(shared() - kBeside, launch.shared_bytes + 2 * kBeside);
  std::memset(shared() - kBeside, kUnwritten, launch.shared_bytes + 2 * kBeside);
  poison(shared() - kBeside, kBeside);
  poison(shared() + launch.shared_bytes, kBeside);
}

std::string Block::run(const Launch& launch, std::uint64_t number) {
  prepare(launch, number);
  release_order(this);
  running_ = free_fiber();
  main_.switch_to(*running_);
  acquire_order(&threads_);
  if (!failure_.empty()) {  // threads in the middle of something are given up with what they used
    free_.clear();
    fibers_.clear();
    shared_ = std::make_unique<SharedMemory>();
    return std::exchange(failure_, {});
  }
  return beside_shared();
}

std::string Block::beside_shared() const {
  const unsigned char* const shared = this->shared();
  for (std::size_t i = 0; i < kBeside; ++i) {
    const std::size_t after = launch_->shared_bytes + i;
    if (shared[after] == kUnwritten && *(shared - 1 - i) == kUnwritten) continue;
    const bool below = shared[after] == kUnwritten;
    return fmt::format("{} wrote beside its {} bytes of shared memory, at byte {}", block_text(), launch_->shared_bytes,
                       below ? -1 - static_cast<std::ptrdiff_t>(i) : static_cast<std::ptrdiff_t>(after));
  }
  return {};
}

Fiber* Block::free_fiber() {
  if (free_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(&Block::fiber_main));
    return fibers_.back().get();
  }
  Fiber* fiber = free_.back();
  free_.pop_back();
  return fiber;
}

// One fiber starts thread after thread until one waits; then run_next goes on with another fiber.
void Block::start_threads() {
  Fiber::entered();
  while (true) {
    Fiber* const fiber = running_;
    while (started_ < count() && first_ready_ == ready_.size()) {
      now_ = reverse_ ? count() - 1 - started_ : started_;
      ++started_;
      Thread& me = thread();
      me.fiber = fiber;
      threadIdx = me.index;
      acquire_order(this);
      launch_->thread();
      release_order(&threads_);
      thread().left = true;
      ++left_;
      if (at_barrier_ > 0) release_barrier();  // those that have left are not waited for
    }
    free_.push_back(fiber);
    if (left_ == count()) {
      running_ = nullptr;
      fiber->switch_to(main_);
    } else {
      running_ = fiber;
      run_next();
    }
  }
}

void Block::resume(int thread) {
  Fiber* const from = running_;
  Fiber* const to = threads_[static_cast<std::size_t>(thread)].fiber;
  now_ = thread;
  threadIdx = threads_[static_cast<std::size_t>(thread)].index;
  if (from == to) return;
  running_ = to;
  from->switch_to(*to);
}

void Block::run_next() {
  release_order(&threads_);  // for the case that nobody comes back
  if (first_ready_ < ready_.size()) {
    const int next = ready_[first_ready_++];
    if (first_ready_ == ready_.size()) {
      ready_.clear();
      first_ready_ = 0;
    }
    resume(next);
  } else if (started_ < count()) {
    Fiber* const from = running_;
    running_ = free_fiber();
    from->switch_to(*running_);
  } else {
    give_up_divergent();
  }
}

void Block::release_barrier() {
  if (at_barrier_ + left_ < count()) return;
  at_barrier_ = 0;
  for (int i = 0; i < count(); ++i) {
    Thread& other = threads_[static_cast<std::size_t>(i)];
    if (other.wait.what != kBlockBarrier) continue;
    other.wait = {};
    if (i != now_) ready_.push_back(i);
  }
  if (reverse_) std::reverse(ready_.begin() + static_cast<std::ptrdiff_t>(first_ready_), ready_.end());
}

void Block::barrier(Place place) {
  const int me = now_;
  const Wait wait{kBlockBarrier, place};
  thread().wait = wait;
  if (at_barrier_ > 0 && !(barrier_wait_ == wait)) give_up_divergent();
  barrier_wait_ = wait;
  ++at_barrier_;
  release_order(&at_barrier_);
  release_barrier();
  while (threads_[static_cast<std::size_t>(me)].wait.what != nullptr) run_next();
  acquire_order(&at_barrier_);
}

void Block::meet(const char* what, Place place, void* mine, Exchange exchange) {
  const int me = now_, first = me / kWarp * kWarp;
  Warp& warp = warps_[static_cast<std::size_t>(me / kWarp)];
  Thread* const lanes = &threads_[static_cast<std::size_t>(first)];
  if (count() - first < kWarp) give_up(where(what, place) + ": the warp has " + std::to_string(count() - first) + " threads");
  thread().wait = {what, place};
  if (warp.arrived > 0 && !(warp.wait == thread().wait)) give_up_divergent();
  warp.wait = thread().wait;
  warp.lanes[me - first] = mine;
  release_order(&warp);
  if (++warp.arrived < kWarp) {
    while (threads_[static_cast<std::size_t>(me)].wait.what != nullptr) run_next();
  } else {
    acquire_order(&warp);
    exchange(warp.lanes);
    release_order(&warp);
    warp.arrived = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      lanes[lane].wait = {};
      if (first + lane != me) ready_.push_back(first + lane);
    }
  }
  acquire_order(&warp);
}

std::string Block::where(const char* what, Place place) const {
  return fmt::format("{}, thread ({}, {}, {}): {} at {}:{}", block_text(), threadIdx.x, threadIdx.y, threadIdx.z, what,
                     place.file, place.line);
}

void Block::give_up(std::string text) {
  failure_ = std::move(text);
  text.~basic_string();  // this stack is never unwound
  release_order(&threads_);
  running_->switch_to(main_);
  __builtin_unreachable();
}

void Block::give_up_divergent() {
  {
    failure_ = block_text() + ": threads wait for each other at different places:";
    std::vector<std::pair<Wait, std::pair<int, int>>> places;  // number of threads, the first of them
    for (int i = 0; i < count(); ++i) {
      const Thread& thread = threads_[static_cast<std::size_t>(i)];
      const Wait wait = thread.left ? Wait{"(left the kernel)", Place("", 0)} : thread.wait;
      if (wait.what == nullptr) continue;
      const auto known = std::find_if(places.begin(), places.end(), [&](const auto& entry) { return entry.first == wait; });
      if (known == places.end())
        places.push_back({wait, {1, i}});
      else
        ++known->second.first;
    }
    for (const auto& [wait, threads] : places) {
      failure_ += fmt::format(" {} from thread {} on at {}", threads.first, threads.second, wait.what);
      failure_ += wait.place.line > 0 ? fmt::format(" {}:{};", wait.place.file, wait.place.line) : ";";
    }
  }
  release_order(&threads_);
  running_->switch_to(main_);
  __builtin_unreachable();
}

std::string run_block(const Launch& launch, std::uint64_t block) {
  thread_local Block mine;
  t_block = &mine;
  return mine.run(launch, block);
}

unsigned char* shared_memory() { return Block::mine().shared(); }
void block_barrier(Place place) { Block::mine().barrier(place); }
void warp_meet(const char* what, Place place, void* mine, Exchange exchange) {
  Block::mine().meet(what, place, mine, exchange);
}

void give_up(const char* what, Place place, const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Block& block = Block::mine();
  block.give_up(block.where(what, place) + ": " + text);
}

void want_shared(const void* address, std::size_t bytes, const char* what, Place place) {
  const Block& block = Block::mine();
  const auto offset = static_cast<const unsigned char*>(address) - block.shared();
  if (offset < 0 || static_cast<std::size_t>(offset) + bytes > block.shared_bytes()) {
    give_up(what, place, "address at byte %td of %zu bytes of shared memory", offset, block.shared_bytes());
  }
  if (offset % 16 != 0) give_up(what, place, "address at byte %td of shared memory is not a multiple of 16", offset);
}

void start_copy(const PendingCopy& copy) {
  Thread& thread = Block::mine().thread();
  thread.copies.emplace_back(thread.group, copy);
}
void commit_copies() { ++Block::mine().thread().group; }

bool next_due_copy(int pending_groups, PendingCopy& copy) {
  Thread& thread = Block::mine().thread();
  if (thread.copies.empty() || thread.copies.front().first >= thread.group - pending_groups) return false;
  copy = thread.copies.front().second;
  thread.copies.erase(thread.copies.begin());
  return true;
}

}  // namespace dattn::cuda::standin
