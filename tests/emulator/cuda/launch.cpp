#include "launch.h"

#include <cuda_runtime.h>
#include <stdlib.h>

#include <atomic>
#include <mutex>

#include "block.h"
#include "device.h"
#include "emulator.h"
#include "kernel_name.h"
#include "shared_memory.h"
#include "turns.h"

namespace fastattn::emulator {
namespace {

std::mutex turn;
std::atomic<uint64_t> launch_count = 0;
const void* kernel = nullptr;
int arch = 0;

uint64_t seed_of_environment() {
  const char* text = getenv("FASTATTN_EMULATOR_SEED");
  return text == nullptr ? 1 : strtoull(text, nullptr, 10);
}

uint64_t the_seed = seed_of_environment();
Random randomness(the_seed);

uint64_t count_of(const dim3& shape) {
  return uint64_t{shape.x} * shape.y * shape.z;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* called) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  if (count_of(grid) == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    record_failure("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
    return cudaErrorInvalidConfiguration;
  }
  if (count_of(threads) == 0 || count_of(threads) > kMaxThreads) {
    record_failure("a block of %llu threads", static_cast<unsigned long long>(count_of(threads)));
    return cudaErrorInvalidConfiguration;
  }
  if (count_of(threads) % kLanes != 0) {
    record_failure("a block of part of a warp, which the emulator does not do");
    return cudaErrorNotSupported;
  }
  if (const size_t allowed = allowed_shared_bytes(called); config.dynamicSmemBytes > allowed) {
    record_failure("%zu bytes of shared memory, where the kernel is allowed %zu",
                   config.dynamicSmemBytes, allowed);
    return cudaErrorInvalidValue;
  }
  if (config.numAttrs > 0) {
    record_failure("launch attributes, which the emulator does not know");
    return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

bool run_blocks(const cudaLaunchConfig_t& config, const Call& call) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const uint64_t count = count_of(grid);
  const Order order(count, randomness);
  const FaultReporter reporter;
  for (uint64_t k = 0; k < count; ++k) {
    const uint64_t n = order[k];
    const uint3 index = {static_cast<unsigned>(n % grid.x),
                         static_cast<unsigned>(n / grid.x % grid.y),
                         static_cast<unsigned>(n / grid.x / grid.y)};
    shared.begin_block(config.dynamicSmemBytes);
    if (!block.run(call, index, {threads.x, threads.y, threads.z}, randomness)) return false;
    if (!shared.is_guard_intact()) {
      record_failure("%s, block (%u, %u, %u): wrote beside its shared memory",
                     kernel_name(kernel).c_str(), index.x, index.y, index.z);
      return false;
    }
  }
  return true;
}

}  // namespace

const void* running_kernel() {
  return kernel;
}

int running_arch() {
  return arch;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Call& call) {
  const std::lock_guard lock(turn);
  if (const cudaError_t error = check(config, call.kernel); error != cudaSuccess) return error;
  ++launch_count;
  kernel = call.kernel;
  arch = 10 * current_device().major + current_device().minor;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  turns.begin_launch();
  if (block.now() > 1u << 31) {  // before it runs over
    shared.forget_all();
    block.restart_clock();
  }
  if (run_blocks(config, call)) return cudaSuccess;
  shared.forget_all();
  return cudaErrorLaunchFailure;
}

void set_seed(uint64_t seed) {
  const std::lock_guard lock(turn);
  the_seed = seed;
  randomness = Random(seed);
}

uint64_t seed() {
  const std::lock_guard lock(turn);
  return the_seed;
}

uint64_t launches() {
  return launch_count;
}

}  // namespace fastattn::emulator
