// The runtime around launches: devices like an A100 and an H100, but with few multiprocessors, so
// that splitting work over them has something to do.
#include "device.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdlib.h>

#include <mutex>
#include <unordered_map>

#include "emulator.h"
#include "failure.h"
#include "shared_memory.h"

namespace fastattn::emulator {
namespace {

constexpr int kMultiprocessors = 4;
constexpr size_t kSharedBytesUnasked = 48 << 10;

constexpr Device kDevices[] = {
    {8, 0, 163 << 10, 164 << 10, 40 << 20},
    {9, 0, 227 << 10, 228 << 10, 50 << 20},
};
constexpr int kDeviceCount = sizeof(kDevices) / sizeof(kDevices[0]);
static_assert(kDevices[kDeviceCount - 1].block_shared_bytes <= kMaxSharedBytes);

thread_local int device_number = 0;

std::mutex attributes_turn;
std::unordered_map<const void*, size_t> shared_bytes_of;

}  // namespace

const Device& current_device() {
  return kDevices[device_number];
}

size_t allowed_shared_bytes(const void* kernel) {
  const std::lock_guard lock(attributes_turn);
  const auto found = shared_bytes_of.find(kernel);
  return found == shared_bytes_of.end() ? kSharedBytesUnasked : found->second;
}

}  // namespace fastattn::emulator

using namespace fastattn::emulator;

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const size_t most = current_device().block_shared_bytes;
  if (value < 0 || static_cast<size_t>(value) > most) {
    record_failure("%d bytes of shared memory: a block has at most %zu", value, most);
    return cudaErrorInvalidValue;
  }
  const std::lock_guard lock(attributes_turn);
  shared_bytes_of[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available";
    default: return last_error();
  }
}

// Errors are returned where they happen, and not remembered.
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDeviceCount;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = device_number;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDeviceCount) return cudaErrorInvalidDevice;
  device_number = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDeviceCount) return cudaErrorInvalidDevice;
  const Device& asked = kDevices[device];
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedBytesUnasked; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = asked.cache_bytes; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = asked.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = asked.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(asked.shared_bytes);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(asked.block_shared_bytes);
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1 << 10; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  constexpr size_t kAlignment = 256;
  *pointer = aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  return *pointer != nullptr || bytes == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* pointer) {
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  memset(pointer, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool is_known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = is_known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
