// The host's side of a launch: what the device is like, device guard, launch, status.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "fastattn/types.h"

namespace fastattn::cuda {

// Asked once per device.
struct DeviceLimits {
  int arch;  // 80, 90, ...
  int multiprocessors;
  int shared_bytes;  // that one block may have
};

cudaError_t device_limits(int device, DeviceLimits* limits);

// The status that an error stands for; its text becomes last_error().
Status status_of(cudaError_t error);

// Makes a device current and the previous one again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && device != previous_) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const {
    return error_;
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
};

// The only way to launch a kernel. Never <<<>>>, so that any C++ compiler can read the callers.
template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), const LaunchConfig& config,
                   const std::type_identity_t<Params>&... params) {
  // More dynamic shared memory than this needs leave.
  constexpr size_t kCommonSharedBytes = 48 << 10;
  if (config.shared_bytes > kCommonSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return error;
    }
  }
  cudaLaunchConfig_t native = {};
  native.gridDim = config.grid;
  native.blockDim = config.block;
  native.dynamicSmemBytes = config.shared_bytes;
  native.stream = config.stream;
  const cudaError_t error = cudaLaunchKernelEx(&native, kernel, params...);
  // NOTE: the runtime remembers the error too; left there, the caller's next check would report it.
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// The same for kernels whose blocks are counted in one dimension. None at all is no error.
template <typename Params>
cudaError_t launch_blocks(void (*kernel)(Params), int64_t blocks, dim3 threads, size_t shared_bytes,
                          cudaStream_t stream, const std::type_identity_t<Params>& params) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(kernel, {static_cast<unsigned>(blocks), threads, shared_bytes, stream}, params);
}

}  // namespace fastattn::cuda
