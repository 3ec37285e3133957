// What went wrong in a launch.
#pragma once

#include <source_location>

namespace fastattn::emulator {

// The line of a kernel that asked for something. Functions of ptx.cuh take it as a default
// argument.
using Where = std::source_location;

inline bool is_same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

// Ends the launch from within a kernel: the thread that calls it, and all others, stop where they
// are. The text of printf's kind follows the names of the kernel, the block and the thread.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(const Where& where, const char* format, ...);

// The same between two blocks, where no thread runs; returns.
[[gnu::format(printf, 1, 2)]] void record_failure(const char* format, ...);

// While one lives, a fault of memory is reported on stderr before it does what it would have done.
class FaultReporter {
 public:
  FaultReporter();
  ~FaultReporter();
  FaultReporter(const FaultReporter&) = delete;
  FaultReporter& operator=(const FaultReporter&) = delete;
};

}  // namespace fastattn::emulator
