// Switching stacks on x86-64: six registers and the stack pointer. The modes of the floating point units are left alone.
#include "switch.h"

asm(R"(
.text
.p2align 4
.globl dattn_standin_switch
.hidden dattn_standin_switch
.type dattn_standin_switch, @function
dattn_standin_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dattn_standin_switch, .-dattn_standin_switch
)");

void* dattn_standin_prepare(void* top, void (*main)()) {
  void** stack = static_cast<void**>(top);  // a multiple of 16
  *--stack = nullptr;                       // where main would return to; leaves the stack aligned as a call does
  *--stack = reinterpret_cast<void*>(main);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  return stack;
}
