// torch's own thread pool, as the kernels borrow it.
#pragma once

#include "fastattn/api.h"

namespace fastattn::bind {

// `count` follows torch.set_num_threads. Indices are handed out one at a time, so uneven bodies
// balance themselves.
Threads torch_threads();

}  // namespace fastattn::bind
