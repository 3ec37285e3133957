// Stacks that take turns on one host thread.
#pragma once

#include <setjmp.h>
#include <stddef.h>

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

  // Leaves the fiber that runs for good.
  [[noreturn]] void go_on();

  // Whether an address lies where the stack would be if it were larger.
  bool is_overflow(const void* address) const;

 private:
  static void begin();

  jmp_buf state_;
  unsigned char* stack_ = nullptr;
};

}  // namespace fastattn::emulator
