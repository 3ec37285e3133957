#pragma once

#include <string>

namespace fastattn::emulator {

// The name of a function that was compiled into this process, with its template arguments, or
// where its code lies if the symbols were stripped.
std::string kernel_name(const void* kernel);

}  // namespace fastattn::emulator
