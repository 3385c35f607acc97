// Fibers: stacks of their own that hand the processor to each other. Sanitizers are told of every switch.
#pragma once

#include <cstddef>

namespace dattn::cuda::standin {

class Fiber {
 public:
  Fiber();                         // of the OS thread that makes it: where it came from
  explicit Fiber(void (*main)());  // with a stack; `main` never returns
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void switch_to(Fiber& to);  // from this, the running one; returns when somebody switches back
  static void entered();      // first call of a fiber's main

 private:
  void* stack_pointer_ = nullptr;
  char* memory_ = nullptr;  // guard page and stack; null for an OS thread's own
  const void* bottom_ = nullptr;
  std::size_t size_ = 0;
  void* tsan_ = nullptr;
  void* asan_ = nullptr;
};

// Orders what ThreadSanitizer sees of two fibers, which switches do not.
void release_order(void* token);
void acquire_order(void* token);

// Marks bytes beside a block's shared memory for AddressSanitizer.
void poison(const void* memory, std::size_t bytes);
void unpoison(const void* memory, std::size_t bytes);

}  // namespace dattn::cuda::standin

// Saves the callee-saved registers and the stack pointer at *save, goes on at `to`. (switch_PROCESSOR.cpp)
extern "C" __attribute__((visibility("hidden"))) void dattn_standin_switch(void** save, void* to);
// The stack pointer from which a new fiber starts `main`.
extern "C" __attribute__((visibility("hidden"))) void* dattn_standin_prepare(void* top, void (*main)());
