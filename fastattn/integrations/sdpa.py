r"""The switch that sends ``torch.nn.functional.scaled_dot_product_attention`` to fastattn and back.

    from fastattn.integrations import sdpa

    sdpa.enable()                       # for the whole process, until sdpa.disable()
    with sdpa.use(fallback="torch"):    # or for a block
        model(inputs)
    print(sdpa.calls())

**Who is reached.** The attribute of the module ``torch.nn.functional`` is replaced, and so is
reached whoever looks the function up there when it is called: ``F.scaled_dot_product_attention``,
``F.multi_head_attention_forward`` and with it ``torch.nn.MultiheadAttention`` and its layers,
models of Hugging Face with ``attn_implementation="sdpa"``, diffusers, timm. Under
``torch.compile`` (``fullgraph=True`` as well) and ``torch.export`` the ops of fastattn are in the
graph; code that was compiled on one side of the switch is compiled again on the other.

**Who is not.** A module that had done ``from torch.nn.functional import
scaled_dot_product_attention`` before keeps torch's (one that does so later follows the switch, both
ways); ``torch._C._nn.scaled_dot_product_attention`` and ``torch.ops.aten``; ``flex_attention`` and
``varlen_attn``; programs exported or scripted before. ``torch.nn.MultiheadAttention`` calls the
function with ``need_weights=False`` alone, as its layers do; and its fast path, which replaces it
and ``TransformerEncoderLayer`` in evaluation without gradients, never does:
``torch.backends.mha.set_fastpath_enabled(False)`` turns that off (:func:`fastattn.convert` replaces
these modules altogether). ``torch.jit.script`` needs torch's own function: script before the
switch, or outside of it.

**What is the same, and what is not.** See
:func:`fastattn.functional.scaled_dot_product_attention`: arguments, meaning, results and gradients
are torch's. Dropout draws other numbers; a second derivative raises; ``sdpa_kernel`` of
``torch.nn.attention`` and ``torch.backends.cuda.enable_*_sdp`` choose among torch's own kernels.

**What fastattn has no kernel for** is an error by default, which names the argument. With
``fallback="torch"`` such a call goes to torch, and :func:`calls` counts it with the reason: nested,
sparse, mkldnn and quantised tensors; dtypes other than float32, bfloat16, float16 and float64;
float64 on CUDA; devices other than the CPU, CUDA (where the build has kernels for it, from compute
capability 8.0 on) and meta; a head_dim of 0, or above 512 (on CUDA 256); forward-mode derivatives.
Any other error is one of the arguments, and is raised either way. A tensor subclass with a
``__torch_function__``, such as ``torch.nn.attention.bias.CausalBias``, is asked as torch would ask
it, and decides for itself.

**Threads.** The switch belongs to the process, as the attribute does: a ``use`` block in one thread
routes the calls of every other one while it lasts. Blocks of several threads may overlap in any
order; the last to end leaves the state that enable and disable asked for.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from fastattn import _C, functional

__all__ = ["Calls", "calls", "disable", "enable", "is_enabled", "use"]

_torch_attention = torch._C._nn.scaled_dot_product_attention

_lock = threading.Lock()
_enabled: str | None = None  # the fallback that enable() was given; None: disabled
_blocks: dict[object, str] = {}  # the fallback of each open use() block, in order of entry
_fallback: str | None = None  # what holds now, of these two
_before = _torch_attention  # what stood in torch.nn.functional
_counts: Counter[str | None] = Counter()  # by what kept a call from fastattn


@dataclass(frozen=True)
class Calls:
    """What went through the switch: to fastattn, and back to torch, by reason.

    A compiled call is counted while it is compiled, which may take more than one attempt.
    """

    fastattn: int
    torch: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"{self.fastattn} to fastattn", f"{sum(self.torch.values())} to torch"]
        return "\n".join(lines + [f"  {n}: {reason}" for reason, n in self.torch.items()])


def enable(fallback: str = "error") -> None:
    """Route scaled_dot_product_attention to fastattn, until :func:`disable`.

    Enabling twice is enabling once, with the last fallback. An open :func:`use` block goes before.

    Args:
        fallback: what becomes of a call that fastattn has no kernel for (see above): "error"
            raises, "torch" lets torch's own function do it.

    Raises:
        TypeError, ValueError: for another fallback.
    """
    _set_enabled(_checked(fallback))


def disable() -> None:
    """Route it to torch again, once every :func:`use` block has ended; twice is once.

    Where somebody else has replaced the attribute meanwhile, theirs stays; what they may have kept
    of ours calls torch.
    """
    _set_enabled(None)


@contextmanager
def use(fallback: str = "error") -> Iterator[None]:
    """Route it to fastattn inside a ``with`` block, and afterwards as before, also by an exception.

    Blocks nest: that which was entered last holds. As a decorator it covers a function.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    >>> before = calls().fastattn
    >>> with use():
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> calls().fastattn - before, is_enabled()
    (1, False)
    """
    fallback, block = _checked(fallback), object()
    with _lock:
        _blocks[block] = fallback
        _apply()
    try:
        yield
    finally:
        with _lock:
            del _blocks[block]
            _apply()


def is_enabled() -> bool:
    """Whether it is routed to fastattn now, by :func:`enable` or :func:`use`."""
    return _fallback is not None


def calls(*, reset: bool = False) -> Calls:
    """What was routed since the process began, or since a call with ``reset``."""
    with _lock:
        back = {reason: n for reason, n in _counts.items() if reason is not None}
        seen = Calls(fastattn=_counts[None], torch=back)
        if reset:
            _counts.clear()
    return seen


def _checked(fallback: str) -> str:
    if fallback not in ("error", "torch"):
        error = ValueError if isinstance(fallback, str) else TypeError
        raise error(f"fallback: expected 'error' or 'torch', got {fallback!r}")
    # The compiler calls the counter while it traces, and leaves it out of the graph.
    torch.compiler.assume_constant_result(_count)  # type: ignore[no-untyped-call]
    return fallback


def _set_enabled(fallback: str | None) -> None:
    global _enabled
    with _lock:
        _enabled = fallback
        _apply()


def _apply() -> None:
    """Make it so; the lock is held."""
    global _fallback, _before
    _fallback = next(reversed(_blocks.values()), _enabled)
    routed = F.scaled_dot_product_attention is scaled_dot_product_attention
    if _fallback is None and routed:
        F.scaled_dot_product_attention = _before
    elif _fallback is not None and not routed:
        _before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch.nn.functional holds while the switch is on; when it is off, torch's function."""
    tensors, fallback = (query, key, value, attn_mask), _fallback
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if fallback is None:
        return _torch_attention(*tensors, dropout_p, is_causal, **options)
    obstacle = _obstacle(query, key, value)
    if obstacle is not None:
        if fallback == "error":
            error = TypeError if ": expected dtype" in obstacle else ValueError
            raise error(f"{obstacle} (sdpa.enable(fallback='torch') leaves such calls to torch)")
        _count(obstacle)
        return _torch_attention(*tensors, dropout_p, is_causal, **options)
    if has_torch_function(tensors):
        out: Tensor = handle_torch_function(
            scaled_dot_product_attention, tensors, *tensors, dropout_p, is_causal, **options
        )
        return out
    _count(None)
    return functional.scaled_dot_product_attention(*tensors, dropout_p, is_causal, **options)


def _count(obstacle: str | None) -> None:
    with _lock:
        _counts[obstacle] += 1


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _obstacle(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why there is no kernel for a call that may be right; what is wrong is not looked for here.

    Dtype and device are those of query: torch wants them equal, too.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            return None
        if x.is_nested or x.layout != torch.strided:
            kind = "a nested one" if x.is_nested else f"layout {x.layout}"
            return f"{name}: expected a dense tensor, got {kind}"
    if query.dtype not in _DTYPES:
        return f"query: expected dtype float32, bfloat16, float16 or float64, got {query.dtype}"
    device = query.device.type
    if device not in ("cpu", "meta") and (problem := _no_device(query)):
        return f"query: expected {problem}, got one on {query.device}"
    limit = 256 if device == "cuda" else 512
    for size in query.shape[-1:] + value.shape[-1:]:
        if not 1 <= size <= limit:
            return f"query, value: expected a head_dim of 1 to {limit} on {device}, got {size}"
    if forward_ad._current_level >= 0:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
                return f"{name}: expected a tensor without forward-mode tangent, got one with it"
    return None


def _no_device(query: Tensor) -> str | None:
    """What is expected in place of this tensor, if its device has no kernels."""
    if query.device.type != "cuda":
        return "a tensor on the CPU or CUDA"
    if not _C.built_with_cuda:
        return "a tensor on the CPU, for which alone this build has kernels"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "a GPU of compute capability 8.0 or later"
    if query.dtype == torch.float64:
        return "dtype float32, bfloat16 or float16 on CUDA (here float64)"
    return None
