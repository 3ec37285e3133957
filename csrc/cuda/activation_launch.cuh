// Launches the kernels of the activations of a dtype.
#pragma once

#include "activation_bias_grad.cuh"
#include "device.cuh"

namespace fastattn::cuda {

template <typename T, Form kForm>
cudaError_t launch_form(const ActivationTask& task, cudaStream_t stream) {
  const bool backward = task.dout.data != nullptr;
  const int64_t blocks = task.tile.strips * ceil_div(task.rows, task.tile.rows);
  return launch_blocks(backward ? activation_backward<T, kForm> : activation_forward<T, kForm>,
                       blocks, kActivationThreads, 0, stream, task);
}

template <typename T>
cudaError_t launch_activation(const ActivationTask& task, cudaStream_t stream) {
  if (task.dbias != nullptr) {
    return launch_blocks(activation_bias_backward<T>, task.tile.strips * task.slices.count,
                         kActivationThreads, kBiasGradSharedBytes<T>, stream, task);
  }
  if (task.up.data != nullptr) return launch_form<T, Form::kGated>(task, stream);
  return task.bias.data != nullptr ? launch_form<T, Form::kBias>(task, stream)
                                   : launch_form<T, Form::kPlain>(task, stream);
}

}  // namespace fastattn::cuda
