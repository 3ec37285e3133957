// Runs small kernels on the emulator and prints what became of each. No framework: the reader of
// the output (tests/test_cuda_emulator.py) decides.
#pragma once

#include "device.cuh"
#include "emulator.h"
#include "ptx.cuh"

namespace fastattn::self_test {

namespace ptx = cuda::ptx;

constexpr int kThreads = 128;

// Prints "<name>: ok" or "<name>: <error>".
void report(const char* name, cudaError_t error);
// The same of what a kernel computed.
void report(const char* name, bool is_right);

template <typename... Params>
cudaError_t run(void (*kernel)(Params...), const std::type_identity_t<Params>&... params) {
  return cuda::launch(kernel, {2, kThreads, 4096, nullptr}, params...);
}

void run_wrong_kernels();
void run_wrong_sm90_kernels();
// Ends the process by a stack "overflow", or by a write to "null".
void run_fault(const char* which);
void run_right_kernels();
void run_right_sm90_kernels();

}  // namespace fastattn::self_test
