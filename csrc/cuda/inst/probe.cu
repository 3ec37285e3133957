#include "../probe.cuh"

namespace fastattn::cuda {

cudaError_t launch_probe(const ProbeParams& params, cudaStream_t stream) {
  return launch(probe_kernel, {1, ptx::kWarpSize, 0, stream}, params);
}

}  // namespace fastattn::cuda
