// A fiber starts by makecontext; from then on it is left and entered by _setjmp and _longjmp, which
// make no system call.

// The checked longjmp believes that there is one stack.
#undef _FORTIFY_SOURCE

#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace fastattn::emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;

struct Birth {
  Fiber* fiber;
  void (*entry)();
  jmp_buf creator;
};
Birth birth;

// A stack grows down into its guard. All stacks lie one after the other at the same distance, and
// would share a few sets of the cache if each began at its very end.
unsigned char* new_stack() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    perror("emulator: stack of a thread");
    abort();
  }
  return static_cast<unsigned char*>(memory);
}

size_t next_colour() {
  static size_t count = 0;
  return count++ * 17 * 64 % (64 << 10);
}

}  // namespace

void Fiber::begin() {
  Fiber& self = *birth.fiber;
  void (*const entry)() = birth.entry;
  if (_setjmp(self.state_) == 0) _longjmp(birth.creator, 1);
  entry();
}

void Fiber::prepare(void (*entry)()) {
  static ucontext_t context;
  if (stack_ == nullptr) stack_ = new_stack();
  birth.fiber = this;
  birth.entry = entry;
  getcontext(&context);
  context.uc_stack.ss_sp = stack_ + kGuardBytes;
  context.uc_stack.ss_size = kStackBytes - next_colour();
  context.uc_link = nullptr;
  makecontext(&context, begin, 0);
  if (_setjmp(birth.creator) == 0) setcontext(&context);
}

void Fiber::switch_between(Fiber& from, Fiber& to) {
  if (_setjmp(from.state_) == 0) _longjmp(to.state_, 1);
}

void Fiber::go_on() {
  _longjmp(state_, 1);
}

bool Fiber::is_overflow(const void* address) const {
  const auto* byte = static_cast<const unsigned char*>(address);
  return stack_ != nullptr && byte >= stack_ && byte < stack_ + kGuardBytes;
}

}  // namespace fastattn::emulator
