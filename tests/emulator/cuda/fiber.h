// Stacks that take turns on one host thread.
#pragma once

#include <stddef.h>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace fastattn::emulator {

class Fiber {
 public:
  // A fiber that was not prepared stands for the code that runs already: one can only come back to
  // it.
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The first switch to this fiber will call entry(), which never returns. Whatever it was doing
  // before is forgotten; its stack is kept.
  void prepare(void (*entry)());

  // Leaves `from`, and returns when something switches to it.
  static void switch_between(Fiber& from, Fiber& to);

  // Whether an address lies where the stack would be if it were larger.
  bool is_overflow(const void* address) const;

 private:
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;  // below it, what a function must preserve
#else
  ucontext_t context_;
#endif
  unsigned char* stack_ = nullptr;
};

}  // namespace fastattn::emulator
