// Chooses and runs kernels: guards the device, takes the stream, turns CUDA's errors into a Status.
#include "device.cuh"
#include "fastattn/cuda_api.h"
#include "kernels.h"

namespace fastattn::cuda {
namespace {

struct ProbeOutput {
  uint32_t arch;
  uint32_t lanes[32];
};

cudaError_t run_probe(cudaStream_t stream, ProbeOutput* host) {
  ProbeOutput* device = nullptr;
  cudaError_t error = cudaMalloc(&device, sizeof(ProbeOutput));
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(device, 0xff, sizeof(ProbeOutput), stream);
  if (error == cudaSuccess) error = launch_probe({&device->arch, device->lanes}, stream);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(host, device, sizeof(ProbeOutput), cudaMemcpyDeviceToHost, stream);
  }
  const cudaError_t synchronised = cudaStreamSynchronize(stream);
  const cudaError_t freed = cudaFree(device);
  if (error == cudaSuccess) error = synchronised;
  return error == cudaSuccess ? freed : error;
}

}  // namespace

Status probe(int32_t device, void* stream, ProbeResult* result) {
  *result = {0, nullptr};
  const DeviceGuard guard(device);
  ProbeOutput output = {};
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = run_probe(static_cast<cudaStream_t>(stream), &output);
  if (error != cudaSuccess) {
    cudaGetLastError();  // not to be found by the caller's next check
    result->error = cudaGetErrorString(error);
    return status_of(error);
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (output.lanes[lane] != lane) {
      result->error = "the probe kernel ran but did not write what it should";
      return Status::kLaunchFailed;
    }
  }
  result->arch = static_cast<int32_t>(output.arch);
  return Status::kOk;
}

}  // namespace fastattn::cuda
