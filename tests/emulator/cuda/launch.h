// One launch at a time.
#pragma once

namespace fastattn::emulator {

// What was launched last.
const void* running_kernel();

}  // namespace fastattn::emulator
