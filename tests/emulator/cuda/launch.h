// One launch at a time.
#pragma once

namespace fastattn::emulator {

// What was launched last.
const void* running_kernel();
// 10 times the compute capability of the device that it runs on: 80, 90.
int running_arch();

}  // namespace fastattn::emulator
