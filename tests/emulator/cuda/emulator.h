// The emulator as tests see it. It runs the kernels of csrc/cuda on the CPU, one block after the
// other, a fiber per thread, and reports what a GPU would let pass or get wrong silently: data
// races in shared memory, copies that nobody waited for, barriers that not everybody reaches. A
// test tool, built into the package by FASTATTN_CUDA=emulate; slow, never shipped.
#pragma once

#include <stdint.h>

namespace fastattn::emulator {

// Decides the order of blocks and threads. At first it is FASTATTN_EMULATOR_SEED, or 1. Launches
// after the same seed are scheduled alike.
void set_seed(uint64_t seed);
uint64_t seed();

// Kernels that have been started by this process.
uint64_t launches();

// What was wrong in the last launch of this host thread that failed; "" before any has.
const char* last_error();

}  // namespace fastattn::emulator
