// Compiled without sanitizers: it is what tells them of the switches.
#include "switch.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom, std::size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* save, const void** bottom_old, std::size_t* size_old);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* memory, std::size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* memory, std::size_t bytes);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* token);
__attribute__((weak)) void __tsan_release(void* token);
}

namespace dattn::cuda::standin {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStack = 64 * 1024;
constexpr unsigned kNoOrder = 1;  // __tsan_switch_to_fiber_no_sync

// Frames under AddressSanitizer are several times as large.
std::size_t stack_bytes() { return __sanitizer_start_switch_fiber != nullptr ? 4 * kStack : kStack; }

}  // namespace

Fiber::Fiber() {
  pthread_attr_t attributes;
  void* bottom = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &bottom, &size_);
    pthread_attr_destroy(&attributes);
  }
  bottom_ = bottom;
  if (__tsan_get_current_fiber != nullptr) tsan_ = __tsan_get_current_fiber();
}

Fiber::Fiber(void (*main)()) : size_(stack_bytes()) {
  void* memory = mmap(nullptr, size_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, kPage, PROT_NONE);
  bottom_ = memory_ + kPage;
  if (__tsan_create_fiber != nullptr) tsan_ = __tsan_create_fiber(0);
  stack_pointer_ = dattn_standin_prepare(memory_ + kPage + size_, main);
}

Fiber::~Fiber() {
  if (memory_ == nullptr) return;
  unpoison(bottom_, size_);
  if (__tsan_destroy_fiber != nullptr) __tsan_destroy_fiber(tsan_);
  munmap(memory_, size_ + kPage);
}

void Fiber::switch_to(Fiber& to) {
  if (__sanitizer_start_switch_fiber != nullptr) __sanitizer_start_switch_fiber(&asan_, to.bottom_, to.size_);
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(to.tsan_, kNoOrder);
  dattn_standin_switch(&stack_pointer_, to.stack_pointer_);
  if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(asan_, nullptr, nullptr);
}

void Fiber::entered() {
  if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}

void release_order(void* token) {
  if (__tsan_release != nullptr) __tsan_release(token);
}
void acquire_order(void* token) {
  if (__tsan_acquire != nullptr) __tsan_acquire(token);
}
void poison(const void* memory, std::size_t bytes) {
  if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(memory, bytes);
}
void unpoison(const void* memory, std::size_t bytes) {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(memory, bytes);
}

}  // namespace dattn::cuda::standin
