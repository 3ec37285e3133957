// The host's side of a launch: status, device guard, launch.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "fastattn/types.h"

namespace fastattn::cuda {

inline Status status_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return Status::kOk;
    case cudaErrorMemoryAllocation: return Status::kOutOfMemory;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: return Status::kNotBuilt;
    default: return Status::kLaunchFailed;
  }
}

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

}  // namespace fastattn::cuda
