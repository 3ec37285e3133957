#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

namespace fastattn::emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;

// A stack grows down into its guard.
unsigned char* new_stack() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    perror("emulator: stack of a thread");
    abort();
  }
  return static_cast<unsigned char*>(memory);
}

// How much of a stack to use. All stacks lie at the same distance from each other, and would share
// a few sets of the cache if each began at its very end.
size_t next_size() {
  static size_t count = 0;
  return kStackBytes - count++ * 17 * 64 % (64 << 10);
}

}  // namespace

bool Fiber::is_overflow(const void* address) const {
  const auto* byte = static_cast<const unsigned char*>(address);
  return stack_ != nullptr && byte >= stack_ && byte < stack_ + kGuardBytes;
}

#ifdef __x86_64__

// Pushes what a function must preserve, stores the stack pointer to *rdi, and goes on with rsi's.
// A system call, as swapcontext makes, would take ten times as long.
extern "C" [[gnu::visibility("hidden")]] void fastattn_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.hidden fastattn_emulator_switch
.globl fastattn_emulator_switch
.type fastattn_emulator_switch, @function
fastattn_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fastattn_emulator_switch, . - fastattn_emulator_switch
.popsection
)");

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  // Six registers, the address of entry(), and where that would return to.
  void** const top = reinterpret_cast<void**>(stack_ + kGuardBytes + next_size());
  for (int i = 1; i <= 8; ++i) top[-i] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  stack_pointer_ = top - 8;
}

void Fiber::switch_between(Fiber& from, Fiber& to) {
  fastattn_emulator_switch(&from.stack_pointer_, to.stack_pointer_);
}

#else

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_ + kGuardBytes;
  context_.uc_stack.ss_size = next_size();
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_between(Fiber& from, Fiber& to) {
  swapcontext(&from.context_, &to.context_);
}

#endif

}  // namespace fastattn::emulator
