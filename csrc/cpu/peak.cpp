// Peak rates of arithmetic, on all threads.
#include "attention_kernels.h"
#include "workspace.h"

namespace fastattn::cpu {
namespace {

double on_all_threads(double (*work)(int64_t), int64_t rounds, const Threads& threads) {
  std::atomic<double> total{0};
  for_each_item(threads, threads.count, threads.count, [&](int64_t, int64_t) {
    const double done = work(rounds);
    for (double before = total; !total.compare_exchange_weak(before, before + done);) {
    }
  });
  return total;
}

}  // namespace

double peak_products(DType dtype, int64_t rounds, const Threads& threads) {
  return on_all_threads(attention_kernels(dtype).peak_products, rounds, threads);
}

double peak_exponentials(int64_t rounds, const Threads& threads) {
  return on_all_threads(attention_kernels(DType::kFloat32).peak_exponentials, rounds, threads);
}

}  // namespace fastattn::cpu
