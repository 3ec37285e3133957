#include "backend.h"

#include "fastattn/api.h"
#include "fastattn/cuda_api.h"
#include "status.h"
#include "threads.h"

#if defined(FASTATTN_CUDA_EMULATE)
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#elif defined(FASTATTN_WITH_CUDA)
#include "cuda_stream.h"
#endif

namespace fastattn::bind {

#if defined(FASTATTN_CUDA_EMULATE)

namespace {

std::atomic<int>& device_in_use() {
  static std::atomic<int> device{[] {
    const char* level = std::getenv("FASTATTN_CPU_ISA");
    return level == nullptr ? kNotEmulated : emulated_device(level);
  }()};
  return device;
}

std::atomic<bool> hiding{false};

}  // namespace

cuda::Place place_of(const Tensor&) {
  return {emulated_device(), nullptr};
}

int emulated_device(const std::string& level) {
  const auto found = std::find(std::begin(kEmulatedLevels), std::end(kEmulatedLevels), level);
  if (found == std::end(kEmulatedLevels)) return kNotEmulated;
  return static_cast<int>(found - std::begin(kEmulatedLevels));
}

int emulated_device() {
  return device_in_use().load(std::memory_order_relaxed);
}

void set_emulated_device(int device) {
  device_in_use().store(device, std::memory_order_relaxed);
}

void hide_from_host(bool on) {
  hiding.store(on, std::memory_order_relaxed);
}

Backend backend_of(const Tensor&) {
  const bool emulated = emulated_device() != kNotEmulated;
  return {.cuda = emulated, .on_device = emulated && hiding.load(std::memory_order_relaxed)};
}

#elif defined(FASTATTN_WITH_CUDA)

cuda::Place place_of(const Tensor& like) {
  cuda::Place place{like.get_device_index(), nullptr};
  if (!current_cuda_stream(place.device, &place.stream)) {
    throw std::runtime_error("fastattn cannot find torch's current CUDA stream");
  }
  return place;
}

Backend backend_of(const Tensor& like) {
  int32_t type = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &type));
  const bool cuda = type == aoti_torch_device_type_cuda();
  return {.cuda = cuda, .on_device = cuda};
}

#else

Backend backend_of(const Tensor&) {
  return {};
}

#endif

#ifdef FASTATTN_WITH_CUDA

void check_cuda_status(Status status) {
  if (status == Status::kNotBuilt) {
    throw std::runtime_error(
        "fastattn was built for the CUDA architectures " FASTATTN_CUDA_ARCHS
        ", and this device runs none of them: rebuild with its own in FASTATTN_CUDA_ARCHS "
        "(nvidia-smi --query-gpu=compute_cap --format=csv prints it; 8.6 is 86)");
  }
  if (status == Status::kLaunchFailed) {
    throw std::runtime_error(std::string("CUDA refused fastattn's kernel: ") + cuda::last_error());
  }
  check_status(status);
}

#endif

void require_kernels_of_dtype(const Backend& backend, const char* argument, const Tensor& tensor) {
  if (backend.cuda && float_dtype(tensor) == DType::kFloat64) {
    fail(argument, "dtype float32, bfloat16 or float16 on CUDA", dtype_text(tensor));
  }
}

void require_kernels(const Backend& backend, const AttentionParams& params, const Tensor& query,
                     const char* value_argument, const Tensor* value) {
  if (!backend.cuda) return;
  require_kernels_of_dtype(backend, "query", query);
  const std::string expected = "a head_dim of 1 to " + got(cuda::kMaxHeadDim) + " on CUDA";
  if (params.head_dim > cuda::kMaxHeadDim) fail("query", expected, shape_text(query));
  if (value != nullptr && params.head_dim_v > cuda::kMaxHeadDim) {
    fail(value_argument, expected, shape_text(*value));
  }
}

void run_forward([[maybe_unused]] const Backend& backend, const AttentionParams& params,
                 [[maybe_unused]] const Tensor& query) {
#ifdef FASTATTN_WITH_CUDA
  if (backend.cuda) {
    const cuda::Place place = place_of(query);
    const Scratch workspace(backend, cuda::attention_forward_workspace(params, place), query);
    return check_cuda_status(cuda::attention_forward(params, workspace.data(), place));
  }
#endif
  check_status(cpu::attention_forward(params, torch_threads()));
}

void run_backward([[maybe_unused]] const Backend& backend, const AttentionGradParams& params,
                  [[maybe_unused]] const Tensor& query) {
#ifdef FASTATTN_WITH_CUDA
  if (backend.cuda) {
    const cuda::Place place = place_of(query);
    const Scratch workspace(backend, cuda::attention_backward_workspace(params, place), query);
    return check_cuda_status(cuda::attention_backward(params, workspace.data(), place));
  }
#endif
  check_status(cpu::attention_backward(params, torch_threads()));
}

void run_cache_write([[maybe_unused]] const Backend& backend, const CacheWriteParams& params,
                     [[maybe_unused]] const Tensor& like) {
#ifdef FASTATTN_WITH_CUDA
  if (backend.cuda) return check_cuda_status(cuda::kv_cache_update(params, place_of(like)));
#endif
  if (params.update.num_tokens == 0) return;
  check_status(cpu::kv_cache_update(params.update, torch_threads()));
}

std::string schedule_of([[maybe_unused]] const Backend& backend, const AttentionParams& params,
                        [[maybe_unused]] const Tensor& query) {
#ifdef FASTATTN_WITH_CUDA
  if (backend.cuda) {
    const cuda::ForwardChoice choice = cuda::attention_choice(params, place_of(query));
    return std::string(choice.schedule) + "\n" + choice.kernel + "\n" +
           (choice.why_not_sm90 ? choice.why_not_sm90 : "") + "\ntiles of " +
           std::to_string(choice.queries) + " rows x " + std::to_string(choice.keys) +
           " keys, heads in a tile: " + std::to_string(choice.heads) +
           ", parts of the keys: " + std::to_string(choice.parts);
  }
#endif
  return cpu::attention_schedule(params);
}

std::string schedule_of([[maybe_unused]] const Backend& backend,
                        [[maybe_unused]] const AttentionGradParams& params,
                        [[maybe_unused]] const Tensor& query) {
#ifdef FASTATTN_WITH_CUDA
  if (backend.cuda) {
    const cuda::BackwardChoice choice = cuda::attention_backward_choice(params, place_of(query));
    return std::string(choice.is_fused ? "fused" : "in order") + "\n" + choice.kernel + "\n" +
           (choice.why_not_sm90 ? choice.why_not_sm90 : "") + "\n" +
           (choice.why_not_fused ? choice.why_not_fused : "");
  }
#endif
  return "in order";
}

}  // namespace fastattn::bind
