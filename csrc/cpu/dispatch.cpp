// Which level runs: what the build has, the CPU offers, the operating system allows and the user
// asked for.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "attention_kernels.h"
#include "rowwise_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastattn::cpu {
namespace {

constexpr const char* kLevelNames[kNumLevels] = {"scalar", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__) && !defined(FASTATTN_CPU_EMULATE)

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  CpuidLeaf(unsigned leaf, unsigned subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

bool has_bits(unsigned word, unsigned bits) {
  return (word & bits) == bits;
}

__attribute__((target("xsave"))) unsigned saved_register_state() {
  return static_cast<unsigned>(_xgetbv(0));
}

// The register state that the operating system saves: without it the instructions fault even if
// CPUID has them.
bool os_saves(unsigned state) {
  constexpr unsigned kOsxsave = 1u << 27;
  return has_bits(CpuidLeaf(1, 0).ecx, kOsxsave) && has_bits(saved_register_state(), state);
}

// Exactly the bits that setup.py compiles each level with.
const char* avx2_obstacle() {
  constexpr unsigned kFma = 1u << 12, kAvx = 1u << 28, kF16c = 1u << 29, kAvx2 = 1u << 5;
  constexpr unsigned kYmmState = 0x6;
  if (!has_bits(CpuidLeaf(1, 0).ecx, kFma | kAvx | kF16c) ||
      !has_bits(CpuidLeaf(7, 0).ebx, kAvx2)) {
    return "the CPU lacks AVX2, FMA or F16C";
  }
  return os_saves(kYmmState) ? nullptr : "the operating system does not save AVX registers";
}

const char* avx512_obstacle() {
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kZmmState = 0xe6;
  if (!has_bits(CpuidLeaf(7, 0).ebx, kF | kDq | kBw | kVl)) {
    return "the CPU lacks AVX-512 F, BW, VL or DQ";
  }
  return os_saves(kZmmState) ? nullptr : "the operating system does not save AVX-512 registers";
}

const char* avx512bf16_obstacle() {
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  return has_bits(CpuidLeaf(7, 1).eax, kAvx512Bf16) ? nullptr : "the CPU lacks AVX512-BF16";
}

const char* amx_obstacle() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr unsigned kTileState = 0x60000;
  if (!has_bits(CpuidLeaf(7, 0).edx, kAmxBf16 | kAmxTile)) {
    return "the CPU lacks AMX-TILE or AMX-BF16";
  }
  if (!os_saves(kTileState)) return "the operating system does not save AMX tiles";
#if defined(__linux__)
  // Tile data is large, so Linux hands it out per process, on request.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return "the operating system refuses AMX tile data to this process";
  }
  return nullptr;
#else
  return "AMX needs Linux";
#endif
}

#endif  // __x86_64__ && !FASTATTN_CPU_EMULATE

struct Obstacles {
  const char* of[kNumLevels];
};

Obstacles find_obstacles() {
#if defined(FASTATTN_CPU_EMULATE)
  return {};
#elif defined(__x86_64__)
  // Each level stands on the one below it.
  constexpr const char* (*kObstacle[])() = {avx2_obstacle, avx512_obstacle, avx512bf16_obstacle,
                                            amx_obstacle};
  Obstacles found = {};
  for (int i = 1; i < kNumLevels; ++i) {
    found.of[i] = found.of[i - 1] != nullptr ? found.of[i - 1] : kObstacle[i - 1]();
  }
  return found;
#else
  constexpr const char* kReason = "not an x86-64 CPU";
  return {{nullptr, kReason, kReason, kReason, kReason}};
#endif
}

const Obstacles& obstacles() {
  static const Obstacles found = find_obstacles();
  return found;
}

// FASTATTN_CPU_ISA, or the highest level where it is unset. Names are checked by the Python package
// at import.
Level limit_from_environment() {
  const char* wanted = std::getenv("FASTATTN_CPU_ISA");
  for (int i = 0; wanted != nullptr && i < kNumLevels; ++i) {
    if (std::strcmp(wanted, kLevelNames[i]) == 0) return static_cast<Level>(i);
  }
  return Level::kAmx;
}

std::atomic<Level>& level_limit() {
  static std::atomic<Level> limit{limit_from_environment()};
  return limit;
}

// The tables of a level. What stands above avx512 has products of bfloat16, for attention.
const AttentionTable& attention_table(Level level) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512) return kAvx512Attention;
  if (level == Level::kAvx2) return kAvx2Attention;
#endif
  (void)level;
  return kScalarAttention;
}

const RowwiseTable& rowwise_table(Level level) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512) return kAvx512Rowwise;
  if (level == Level::kAvx2) return kAvx2Rowwise;
#endif
  (void)level;
  return kScalarRowwise;
}

template <typename Table>
const auto& of_dtype(const Table& table, DType dtype) {
  if (dtype == DType::kBFloat16) return table.bf16;
  if (dtype == DType::kFloat16) return table.f16;
  return table.f32;
}

}  // namespace

const char* level_name(Level level) {
  return kLevelNames[static_cast<int>(level)];
}

const char* level_obstacle(Level level) {
  return obstacles().of[static_cast<int>(level)];
}

Level detected_level() {
  for (int i = kNumLevels - 1; i > 0; --i) {
    if (obstacles().of[i] == nullptr) return static_cast<Level>(i);
  }
  return Level::kScalar;
}

Level active_level() {
  return min_of(detected_level(), level_limit().load(std::memory_order_relaxed));
}

void set_level_limit(Level limit) {
  level_limit().store(limit, std::memory_order_relaxed);
}

const AttentionKernels& attention_kernels(DType dtype) {
  if (dtype == DType::kFloat64) return kScalarAttentionF64;
  const Level level = active_level();
#if defined(__x86_64__)
  if (dtype == DType::kBFloat16 && level == Level::kAmx) return kAmxAttentionBf16;
  if (dtype == DType::kBFloat16 && level == Level::kAvx512Bf16) return kDotAttentionBf16;
#endif
  return of_dtype(attention_table(level), dtype);
}

const RowwiseKernels& rowwise_kernels(DType dtype) {
  if (dtype == DType::kFloat64) return kScalarRowwiseF64;
  return of_dtype(rowwise_table(active_level()), dtype);
}

}  // namespace fastattn::cpu
