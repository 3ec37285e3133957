// Which kernels an op runs on: csrc/cpu's, csrc/cuda's, or, in a build for tests, those of
// csrc/cuda over an emulator that computes on the CPU. Here alone the ops learn of the difference.
#pragma once

#include <memory>
#include <string>

#include "fastattn/cuda_api.h"
#include "fastattn/kv_cache_params.h"
#include "fastattn/params.h"
#include "tensor_args.h"

// The ops take tensors on GPUs.
#if defined(FASTATTN_WITH_CUDA) && !defined(FASTATTN_CUDA_EMULATE)
#define FASTATTN_ON_CUDA
#endif

namespace fastattn::bind {

struct Backend {
  bool cuda = false;       // csrc/cuda's kernels
  bool on_device = false;  // what the tensors hold is out of the host's reach
};

// That of an op whose tensors are on the device of `like`.
Backend backend_of(const Tensor& like);

#ifdef FASTATTN_WITH_CUDA
// The device of `like` and the stream that torch works in there.
cuda::Place place_of(const Tensor& like);
// Throws what a status of csrc/cuda means to the user.
void check_cuda_status(Status status);
#endif

#ifdef FASTATTN_CUDA_EMULATE
// The levels at which ops on CPU tensors run on the emulator, each on the device of its number
// there.
constexpr const char* kEmulatedLevels[] = {"sm80", "sm90"};
constexpr int kNotEmulated = -1;
// The number of one of these names.
int emulated_device(const std::string& level);
// That of the level in use, by FASTATTN_CPU_ISA at first.
int emulated_device();
void set_emulated_device(int device);
// From now on the emulator's tensors are treated as those of a GPU: the host reads none, and so
// refuses nothing that they hold.
void hide_from_host(bool on);
#endif

// Throws unless the backend has kernels for the dtype of a tensor.
void require_kernels_of_dtype(const Backend& backend, const char* argument, const Tensor& tensor);

// Throws unless the backend has kernels for this dtype and these head dims. `value` may be null.
void require_kernels(const Backend& backend, const AttentionParams& params, const Tensor& query,
                     const char* value_argument, const Tensor* value);

void run_forward(const Backend& backend, const AttentionParams& params, const Tensor& query);
void run_backward(const Backend& backend, const AttentionGradParams& params, const Tensor& query);
// Of params.rows where csrc/cuda writes, of params.update's tokens where csrc/cpu does.
void run_cache_write(const Backend& backend, const CacheWriteParams& params, const Tensor& like);
// The schedule of a call; on CUDA, in lines of their own, also the architecture that the kernel is
// written for, why it is not that of sm_90, and its tiles.
std::string schedule_of(const Backend& backend, const AttentionParams& params, const Tensor& query);
// The same of a backward pass: "fused" or "in order", and on CUDA in the third line why it is not
// fused.
std::string schedule_of(const Backend& backend, const AttentionGradParams& params,
                        const Tensor& query);

// Uninitialised memory for the time of one op, on its device.
class Scratch {
 public:
  Scratch(const Backend& backend, size_t bytes, const Tensor& query) {
    if (!backend.cuda) {
      host_.reset(new char[bytes]);  // cheaper than a tensor
    } else if (bytes > 0) {
      tensor_ = empty_contiguous({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), query);
    }
  }

  void* data() const {
    return tensor_ ? tensor_->data_ptr() : host_.get();
  }

 private:
  std::unique_ptr<char[]> host_;
  OptionalTensor tensor_;
};

}  // namespace fastattn::bind
