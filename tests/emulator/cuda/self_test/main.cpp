#include <stdio.h>
#include <string.h>

#include "fastattn/cuda_api.h"
#include "kernels.h"

namespace fastattn::self_test {

void report(const char* name, cudaError_t error) {
  printf("%s: %s\n", name, error == cudaSuccess ? "ok" : cudaGetErrorString(error));
}

void report(const char* name, bool is_right) {
  printf("%s: %s\n", name, is_right ? "ok" : "wrong");
}

void report_probe() {
  cuda::ProbeResult result;
  const Status status = cuda::probe(0, nullptr, &result);
  report("probe", status == Status::kOk && result.arch == 800);
}

}  // namespace fastattn::self_test

int main(int count, char** arguments) {
  using namespace fastattn;
  if (count == 2) self_test::run_fault(arguments[1]);
  self_test::report_probe();
  self_test::run_wrong_kernels();
  self_test::run_wrong_sm90_kernels();
  self_test::run_right_kernels();
  self_test::run_right_sm90_kernels();
  printf("launches: %llu\n", static_cast<unsigned long long>(emulator::launches()));
}
