// The functions of each backend. They return a status and never throw, exit or print.
#pragma once

#include "activation_params.h"
#include "kv_cache_params.h"
#include "linear_params.h"
#include "norm_params.h"
#include "params.h"
#include "rope_params.h"

namespace fastattn {

// How the caller's thread pool is borrowed: run(n, body, context) calls body(i, context) for i in
// [0, n), concurrently where it can, and returns when all are done.
struct Threads {
  int64_t count;
  void (*run)(int64_t n, void (*body)(int64_t i, void* context), void* context);
};

namespace cpu {

// The levels, slowest first; each one includes the features of those before it.
enum class Level : int32_t { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr int kNumLevels = 5;

const char* level_name(Level level);

// The highest level that this build, this CPU and this operating system can run.
Level detected_level();

// The level in use: detected_level(), lowered by FASTATTN_CPU_ISA or by set_level_limit.
Level active_level();
void set_level_limit(Level limit);

// Why `level` cannot run here, or nullptr when it can.
const char* level_obstacle(Level level);

Status attention_forward(const AttentionParams& params, const Threads& threads);
Status attention_backward(const AttentionGradParams& params, const Threads& threads);
Status attention_weights(const AttentionWeightsParams& params, const Threads& threads);
Status kv_cache_update(const CacheUpdateParams& params, const Threads& threads);

// act(input + bias) or act(input) * up, and their gradients.
Status activation_forward(const ActivationParams& params, const Threads& threads);
Status activation_backward(const ActivationParams& params, const Threads& threads);

Status rope(const RopeParams& params, const Threads& threads);
Status linear(const LinearParams& params, const Threads& threads);

// Name of the schedule that attention_forward takes for these params: "tile", "decode", or "decode
// and tile" where the sequences of a batch differ.
const char* attention_schedule(const AttentionParams& params);

// Ceilings: rounds of the products that attention of a dtype is made of at the active level, or of
// e^x in float32, on every thread and with no memory in their way. Returns the FLOPs, or
// exponentials, done.
double peak_products(DType dtype, int64_t rounds, const Threads& threads);
double peak_exponentials(int64_t rounds, const Threads& threads);

Status norm_forward(const NormParams& params, const Threads& threads);
Status norm_backward(const NormGradParams& params, const Threads& threads);

}  // namespace cpu
}  // namespace fastattn
