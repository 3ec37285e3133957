// What the devices are like, and what they last complained about.
#include <atomic>
#include <mutex>
#include <string>

#include "device.cuh"
#include "fastattn/cuda_api.h"

namespace fastattn::cuda {
namespace {

constexpr int kMostDevices = 64;

thread_local std::string error_text;

cudaError_t read_limits(int device, DeviceLimits* limits) {
  int major = 0, minor = 0;
  const std::pair<cudaDeviceAttr, int*> wanted[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_bytes},
  };
  for (const auto& [attribute, value] : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return error;
  }
  limits->arch = 10 * major + minor;
  return cudaSuccess;
}

}  // namespace

cudaError_t device_limits(int device, DeviceLimits* limits) {
  static std::mutex mutex;
  static DeviceLimits known[kMostDevices];
  static std::atomic<bool> is_known[kMostDevices];
  if (device < 0 || device >= kMostDevices) return read_limits(device, limits);
  if (!is_known[device].load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex);
    const cudaError_t error = read_limits(device, &known[device]);
    if (error != cudaSuccess) return error;
    is_known[device].store(true, std::memory_order_release);
  }
  *limits = known[device];
  return cudaSuccess;
}

Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return Status::kOk;
  error_text = cudaGetErrorString(error);
  switch (error) {
    case cudaErrorMemoryAllocation: return Status::kOutOfMemory;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: return Status::kNotBuilt;
    default: return Status::kLaunchFailed;
  }
}

const char* last_error() {
  return error_text.c_str();
}

}  // namespace fastattn::cuda
