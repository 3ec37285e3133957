// What a kernel's status means to the user.
#pragma once

#include <stdexcept>

#include "fastattn/types.h"

namespace fastattn::bind {

inline void check_status(Status status) {
  switch (status) {
    case Status::kOk: return;
    case Status::kOutOfMemory: throw std::runtime_error("fastattn could not allocate a workspace");
    case Status::kNotBuilt: throw std::runtime_error("this build of fastattn lacks the kernel");
    case Status::kLaunchFailed: throw std::runtime_error("the device refused fastattn's kernel");
  }
}

}  // namespace fastattn::bind
