"""Whether Python looks at what a tensor holds: on a GPU it would wait for it to be there."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING_OPS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
READING_METHODS = {
    *(torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.cpu),
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__),
    torch.Tensor.__index__,
}


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in READING_METHODS, f"the host reads: {function}"
        return function(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in READING_OPS, f"the host reads: {function}"
        if function is torch.ops.aten.index.Tensor:
            masks = (x for x in args[1] if x is not None)
            assert all(x.dtype != torch.bool for x in masks), "the host counts a mask"
        return function(*args, **(kwargs or {}))


class no_host_reads:
    """AssertionError where the block reads a tensor."""

    def __enter__(self):
        self.modes = [_Functions(), _Ops()]
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)
