// The smallest kernel: what ran, and that all of its warp did.
#pragma once

#include "device.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace fastattn::cuda {

static __global__ void probe_kernel(ProbeParams params) {
  const int lane = ptx::lane_id();
  params.lanes[lane] = static_cast<uint32_t>(lane);
  if (lane == 0) *params.arch = ptx::compiled_arch();
}

}  // namespace fastattn::cuda
