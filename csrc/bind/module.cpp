// The extension module: what was built, what this machine can run, and settings. The ops register
// themselves with torch when the module is loaded (ops_*.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "fastattn/api.h"
#include "threads.h"
#ifdef FASTATTN_WITH_CUDA
#include "cuda_stream.h"
#include "fastattn/cuda_api.h"
#endif
#ifdef FASTATTN_CUDA_EMULATE
#include <emulator.h>
#endif

namespace py = pybind11;

namespace fastattn {
namespace {

constexpr const char* kCompiler =
#if defined(__clang__)
    "clang " __clang_version__;
#else
    "gcc " __VERSION__;
#endif

using LevelObstacle = std::pair<std::string, std::optional<std::string>>;

std::vector<LevelObstacle> cpu_levels() {
  std::vector<LevelObstacle> levels;
  for (int i = 0; i < cpu::kNumLevels; ++i) {
    const auto level = static_cast<cpu::Level>(i);
    const char* obstacle = cpu::level_obstacle(level);
    levels.emplace_back(cpu::level_name(level),
                        obstacle ? std::optional<std::string>(obstacle) : std::nullopt);
  }
#ifdef FASTATTN_CUDA_EMULATE
  for (const char* level : bind::kEmulatedLevels) levels.emplace_back(level, std::nullopt);
#endif
  return levels;
}

std::string active_cpu_level() {
#ifdef FASTATTN_CUDA_EMULATE
  const int device = bind::emulated_device();
  if (device != bind::kNotEmulated) return bind::kEmulatedLevels[device];
#endif
  return cpu::level_name(cpu::active_level());
}

void require_level_runs(cpu::Level level) {
  if (level <= cpu::detected_level()) return;
  const char* obstacle = cpu::level_obstacle(level);
  throw py::value_error(std::string("name: '") + cpu::level_name(level) + "' cannot run here (" +
                        (obstacle ? obstacle : "above the detected level") +
                        "); the highest level is '" + cpu::level_name(cpu::detected_level()) + "'");
}

void set_cpu_level(const std::string& name) {
#ifdef FASTATTN_CUDA_EMULATE
  if (const int device = bind::emulated_device(name); device != bind::kNotEmulated) {
    bind::set_emulated_device(device);
    return cpu::set_level_limit(cpu::detected_level());
  }
#endif
  std::string known;
  for (int i = 0; i < cpu::kNumLevels; ++i) {
    const auto level = static_cast<cpu::Level>(i);
    known += (i ? ", " : "") + std::string(cpu::level_name(level));
    if (name != cpu::level_name(level)) continue;
    require_level_runs(level);
    cpu::set_level_limit(level);
#ifdef FASTATTN_CUDA_EMULATE
    bind::set_emulated_device(bind::kNotEmulated);
#endif
    return;
  }
  throw py::value_error("name: expected one of " + known + ", got '" + name + "'");
}

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  std::string arch;
  for (const char* c = FASTATTN_CUDA_ARCHS; *c; ++c) {
    if (*c != ';') {
      arch += *c;
      continue;
    }
    archs.push_back(arch);
    arch.clear();
  }
  if (!arch.empty()) archs.push_back(arch);
  return archs;
}

#ifdef FASTATTN_ON_CUDA
constexpr bool kOnCuda = true;
#else
constexpr bool kOnCuda = false;
#endif

#ifdef FASTATTN_WITH_CUDA
std::pair<int, bool> cuda_probe(int device) {
  void* stream = nullptr;
  const bool torch_stream = current_cuda_stream(device, &stream);
  cuda::ProbeResult result;
  if (cuda::probe(device, stream, &result) != Status::kOk) {
    throw std::runtime_error("CUDA device " + std::to_string(device) + ": " + result.error);
  }
  return {result.arch, torch_stream};
}
#endif

// FLOPs of the products of a dtype, or exponentials, done in so many rounds on every thread.
double cpu_peak(const std::string& what, int64_t rounds) {
  const Threads threads = bind::torch_threads();
  if (what == "exp") return cpu::peak_exponentials(rounds, threads);
  if (what == "fp32") return cpu::peak_products(DType::kFloat32, rounds, threads);
  if (what == "bf16") return cpu::peak_products(DType::kBFloat16, rounds, threads);
  if (what == "fp16") return cpu::peak_products(DType::kFloat16, rounds, threads);
  throw py::value_error("what: expected 'fp32', 'bf16', 'fp16' or 'exp', got '" + what + "'");
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
  using namespace fastattn;
  m.attr("version") = FASTATTN_VERSION;
  m.attr("compiler") = kCompiler;
  m.attr("build_flags") = FASTATTN_BUILD_FLAGS;
  m.attr("built_with_cuda") = kOnCuda;
  m.attr("cuda_archs") = py::tuple(py::cast(cuda_archs()));
  m.def("cpu_levels", &cpu_levels);
  m.def("active_cpu_level", &active_cpu_level);
  m.def("set_cpu_level", &set_cpu_level, py::arg("name"));
  m.def("cpu_peak", &cpu_peak, py::arg("what"), py::arg("rounds"),
        py::call_guard<py::gil_scoped_release>());
#ifdef FASTATTN_CUDA_EMULATE
  m.attr("emulated_levels") = py::tuple(py::cast(std::vector<std::string>(
      std::begin(bind::kEmulatedLevels), std::end(bind::kEmulatedLevels))));
  m.def("emulator_launches", &emulator::launches);
  m.def("set_emulator_seed", &emulator::set_seed, py::arg("seed"));
  m.def("hide_from_host", &bind::hide_from_host, py::arg("on"));
#else
  m.attr("emulated_levels") = py::tuple();
#endif
#ifdef FASTATTN_WITH_CUDA
  m.def("cuda_probe", &cuda_probe, py::arg("device") = 0, py::call_guard<py::gil_scoped_release>());
#endif
}
