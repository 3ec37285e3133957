#include "failure.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "block.h"
#include "emulator.h"
#include "kernel_name.h"
#include "launch.h"

namespace fastattn::emulator {
namespace {

thread_local char last_text[4096];

int write_name(char* text, size_t size) {
  return snprintf(text, size, "%s, block (%u, %u, %u), thread %d",
                  kernel_name(running_kernel()).c_str(), blockIdx.x, blockIdx.y, blockIdx.z,
                  block.current().number);
}

}  // namespace

const char* last_error() {
  return last_text;
}

// NOTE: the stack that this runs on is left for good, so nothing on it may own anything.
void fail(const Where& where, const char* format, ...) {
  static char what[2048], who[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  write_name(who, sizeof(who));
  snprintf(last_text, sizeof(last_text), "emulator: %s: %s (%s:%u)", who, what, where.file_name(),
           where.line());
  block.abandon();
}

void record_failure(const char* format, ...) {
  char what[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  snprintf(last_text, sizeof(last_text), "emulator: %s", what);
}

// ---- Faults -------------------------------------------------------------------------------------

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
struct sigaction previous_action[2];
stack_t previous_stack;
alignas(16) unsigned char signal_stack[256 << 10];

// A second fault at the same instruction meets the handler that was there before.
void report_fault(int signal, siginfo_t* info, void*) {
  static char who[512], text[1024];
  write_name(who, sizeof(who));
  const bool is_overflow = block.current().fiber.is_overflow(info->si_addr);
  const int length = snprintf(text, sizeof(text), "emulator: %s: %s at address %p\n", who,
                              is_overflow         ? "stack overflow"
                              : signal == SIGSEGV ? "segmentation fault"
                                                  : "bus error",
                              info->si_addr);
  if (write(STDERR_FILENO, text, static_cast<size_t>(length)) < 0) _exit(1);
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &previous_action[i], nullptr);
}

}  // namespace

FaultReporter::FaultReporter() {
  const stack_t stack = {signal_stack, 0, sizeof(signal_stack)};
  sigaltstack(&stack, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = report_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &previous_action[i]);
}

FaultReporter::~FaultReporter() {
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &previous_action[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace fastattn::emulator
