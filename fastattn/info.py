"""What this installation can run, what runs for given arguments, and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import _C
from fastattn._ops import attention as _ops
from fastattn._ops import kv_cache as _cache_ops
from fastattn._version import __version__
from fastattn.functional import _arguments
from fastattn.functional.attention import attention, attention_varlen
from fastattn.functional.kv_cache import attention_with_cache

__all__ = ["Explanation", "Info", "explain", "info"]


# What changes how fastattn runs.
_ENVIRONMENT = ("FASTATTN_CPU_ISA", "OMP_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")


@dataclass(frozen=True)
class Info:
    """The state of this installation; prints as a table."""

    version: str
    torch: str
    python: str
    system: str
    compiler: str
    cpu: str
    cpu_levels: Mapping[str, str | None]  # slowest first, with what keeps each from running here
    cpu_level: str
    cpu_level_reason: str
    threads: int
    cuda: str
    cuda_archs: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        levels = [f"{name:<12}{why or 'runs here'}" for name, why in self.cpu_levels.items()]
        variables = [f"{name}={value}" for name, value in self.environment.items()] or ["none set"]
        rows = {
            "fastattn": [f"{self.version} (compiled by {self.compiler})"],
            "torch": [self.torch],
            "python": [f"{self.python} on {self.system}"],
            "cpu": [self.cpu],
            "levels": levels,
            "level": [f"{self.cpu_level}: {self.cpu_level_reason}"],
            "threads": [f"{self.threads} (torch.set_num_threads)"],
            "cuda": [self.cuda],
            "environment": variables,
        }
        return "\n".join(
            f"{name if i == 0 else '':<13}{line}"
            for name, lines in rows.items()
            for i, line in enumerate(lines)
        )

    __repr__ = __str__


@dataclass(frozen=True)
class Explanation:
    """Which kernel runs a call, and why each other one does not; prints as a list."""

    kernel: str
    reasons: tuple[str, ...]
    rejected: Mapping[str, str]
    backward: Explanation | None = None  # of the gradients, where there are to be some

    def __str__(self) -> str:
        lines = [self.kernel, *(f"  {reason}" for reason in self.reasons)]
        lines += [f"not {name}: {why}" for name, why in self.rejected.items()]
        if self.backward is not None:
            lines += ["backward:", *(f"  {line}" for line in str(self.backward).splitlines())]
        return "\n".join(lines)

    __repr__ = __str__


def info() -> Info:
    """Versions, CPU levels and the one in use, threads, CUDA, and variables that are set.

    >>> import fastattn
    >>> fastattn.info().cpu_level in fastattn.info().cpu_levels
    True
    """
    level, reason = _level_in_use()
    return Info(
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        compiler=_C.compiler,
        cpu=_cpu_name(),
        cpu_levels=dict(_C.cpu_levels()),
        cpu_level=level,
        cpu_level_reason=reason,
        threads=torch.get_num_threads(),
        cuda=_cuda(),
        cuda_archs=_C.cuda_archs,
        environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    )


def _cuda() -> str:
    if _C.emulated_levels:
        return f"emulated, for tests, at levels {', '.join(_C.emulated_levels)}"
    return f"built for {', '.join(_C.cuda_archs)}" if _C.built_with_cuda else _NO_CUDA


_NO_CUDA = "not built (FASTATTN_CUDA=1 at build time, with nvcc, builds it)"


def explain(
    query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any
) -> Explanation:
    """Which kernel ``attention`` runs for these arguments, and why each other one does not.

    Takes what :func:`fastattn.functional.attention` takes; with ``cu_seqlens_q`` what
    ``attention_varlen`` takes; with ``k_cache`` and ``v_cache``, by name, what
    ``attention_with_cache`` takes. Raises what these raise, and computes and writes nothing. Where
    a tensor requires grad, ``backward`` tells the same of the gradients; that of the result is
    taken to lie in memory as the result does.

    >>> import fastattn
    >>> q = torch.randn(1, 2, 64, 64)
    >>> print(fastattn.explain(q.double(), q.double(), q.double()).kernel)
    cpu/scalar/tile
    """
    packed: Any = attention_varlen if "cu_seqlens_q" in options else attention
    function = attention_with_cache if "k_cache" in options else packed
    devices = [query.device] if query.is_cuda else []
    with torch.random.fork_rng(devices), _Recorder() as recorder:  # type: ignore[no-untyped-call]
        function(query, key=key, value=value, **options)
    on_cuda = query.is_cuda or _C.active_cpu_level() in _C.emulated_levels
    explanation = (_on_cuda if on_cuda else _on_cpu)(query, recorder, options)
    if recorder.differentiated is not None:
        assert key is not None and value is not None
        needs = query.requires_grad, key.requires_grad or value.requires_grad
        explanation = replace(explanation, backward=_backward(explanation, recorder, needs))
    if recorder.dtype != query.dtype:
        cast = f"autocast: {query.dtype} inputs are cast to {recorder.dtype}"
        explanation = replace(explanation, reasons=(*explanation.reasons, cast))
    return explanation


def _on_cpu(query: Tensor, recorder: _Recorder, options: Mapping[str, Any]) -> Explanation:
    schedule, dtype = recorder.schedule, recorder.dtype
    rejected: dict[str, str] = {}
    level, why = _level_in_use()
    if dtype == torch.float64 and level != "scalar":
        rejected[level] = "float64 has scalar kernels only (they serve gradient checks)"
        level, why = "scalar", "the level of float64"
    reasons = [f"level {level}: {why}"]
    names = [name for name, _ in _C.cpu_levels()]
    for name, obstacle in _C.cpu_levels():
        if obstacle is not None:
            rejected[name] = obstacle
        elif name in _C.emulated_levels:
            rejected[name] = "an emulation, for tests: it is chosen by its name"
        elif name != level and name not in rejected:
            above = names.index(name) > names.index(level)
            rejected[name] = why if above else f"slower than {level}"
    _add_schedules(schedule, _SCHEDULES, options, reasons, rejected)
    rejected["cuda"] = "the tensors are on the CPU" if _C.built_with_cuda else _NO_CUDA
    kernel = "no kernel" if schedule == "none" else f"cpu/{level}/{schedule}"
    return Explanation(kernel, tuple(reasons), rejected)


def _on_cuda(query: Tensor, recorder: _Recorder, options: Mapping[str, Any]) -> Explanation:
    schedule = recorder.schedule
    if query.is_cuda:
        device = torch.cuda.get_device_name(query.device)
        reasons = [f"device {query.device}: {device}; built for {', '.join(_C.cuda_archs)}"]
        rejected = {"cpu": f"the tensors are on {query.device}"}
    else:
        level, why = _level_in_use()
        reasons, rejected = [f"level {level}: {why}"], {"cpu": "emulated"}
    if recorder.arch == "sm90":
        rejected["sm80"] = _ON_SM90
    elif recorder.arch:
        rejected["sm90"] = recorder.why_not_sm90
    _add_schedules(schedule, _CUDA_SCHEDULES, options, reasons, rejected)
    if recorder.tiles:
        reasons.append(recorder.tiles)
    if "decode" in rejected and options.get("dropout_p"):
        rejected["decode"] = "it has no dropout"
    backend = "cuda" if query.is_cuda else "emulated"
    kernel = "no kernel" if schedule == "none" else f"{backend}/{recorder.arch}/{schedule}"
    return Explanation(kernel, tuple(reasons), rejected)


def _backward(
    forward: Explanation, recorder: _Recorder, needs: tuple[bool, bool]
) -> Explanation | None:
    """``needs``: the gradient of query, those of key and value."""
    assert recorder.differentiated is not None
    tensors, options = recorder.differentiated
    said = _ops.attention_backward_schedule(*tensors, *needs, **options).split("\n")
    schedule = said[0]
    if schedule == "none":
        return Explanation("no kernel", ("a dimension is 0, so the gradients are 0",), {})
    backend, arch, _ = forward.kernel.split("/")
    rejected = {}
    if len(said) > 1:
        _, arch, why_not_sm90, why_not_fused = said
        rejected["sm80" if arch == "sm90" else "sm90"] = why_not_sm90 or _ON_SM90
        if why_not_fused:
            rejected["fused"] = why_not_fused
        else:
            remedy = "; deterministic=True asks for it" if arch == "sm80" else ""
            rejected["in order"] = "it computes the scores twice" + remedy
    if schedule == "fused" and options["deterministic"]:
        schedule = "fused in order"
    reasons = [f"schedule {schedule}: {_BACKWARD[schedule]}"]
    if len(said) > 1 and options["bias"] is not None:
        reasons.append("the gradient of bias, if asked for: a kernel of sm80 of its own")
    return Explanation(f"{backend}/{arch}/{schedule}", tuple(reasons), rejected)


_ON_SM90 = "the GPU has instructions that the kernel of sm90 is written for"
_BACKWARD = {
    "fused": "one kernel for all gradients adds those of query up by atomics, in no fixed order",
    "fused in order": "one kernel for all gradients; tiles of keys add to those of query in turn",
    "in order": "each gradient is added up in one order: equal calls give equal bits",
}

# Each schedule: when it runs, and why each other one does not.
_Schedules = Mapping[str, tuple[str, Mapping[str, str]]]


def _add_schedules(
    schedule: str,
    schedules: _Schedules,
    options: Mapping[str, Any],
    reasons: list[str],
    rejected: dict[str, str],
) -> None:
    if schedule == "none":
        reasons.append("no kernel: a dimension is 0, so the results are 0 and -inf")
        return
    taken = schedule.split(" and ")
    for name in taken:
        reason, others = schedules[name]
        reasons.append(f"schedule {name}: {reason}")
        for other, why in others.items():
            if name == "tile" and options.get("batch_invariant"):
                why = "batch_invariant keeps one schedule for every shape"
            if other not in taken:
                rejected[other] = why


_DECODE = "few query rows: one pass over keys and values for all query heads of a KV head"
_NOT_DECODE = "more query rows than it reads the cache for"

# Each sequence of a batch takes the one that suits its query length.
_SCHEDULES: _Schedules = {
    "tile": (
        "keys and values are packed once and shared by tiles of query rows",
        {"decode": _NOT_DECODE},
    ),
    "decode": (
        _DECODE,
        {"tile": "so few query rows do not pay for the packing of keys and values"},
    ),
}

# A whole batch takes one of them.
_CUDA_SCHEDULES: _Schedules = {
    "tile": (
        "a thread block for every tile of query rows goes over all keys that it sees",
        {
            "split tile": "the tiles of query rows occupy the GPU, or have few keys to share",
            "decode": _NOT_DECODE,
        },
    ),
    "split tile": (
        "thread blocks share the keys of a tile of query rows, and their results are merged",
        {"tile": "too few tiles of query rows to occupy the GPU", "decode": _NOT_DECODE},
    ),
    "decode": (
        _DECODE,
        {
            "tile": "so few query rows leave most of a tile empty",
            "split tile": "so few query rows leave most of a tile empty",
        },
    ),
}


_CACHE_SCHEDULE = _cache_ops.attention_with_cache_schedule


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Asks for the schedule of the attention that is called, in place of computing it."""

    schedule: str
    dtype: torch.dtype
    # Of a call with gradients: query, key and value, and the options.
    differentiated: tuple[Sequence[Tensor], dict[str, Any]] | None = None
    # Of a CUDA kernel: what it is written for, why it is none of sm_90, its tiles.
    arch = why_not_sm90 = tiles = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ops.attention_plain:
            query, key, value, causal, scale, bshd = args
            right = 0 if causal else _arguments.UNLIMITED
            args, kwargs = (query, key, value), {"scale": scale, "bshd": bshd}
            self._record(args, kwargs | {"window_right": right})
            return _ops.attention_forward_fake(*args, **kwargs)[0]
        if func is _ops.attention_forward:
            self._record(args, kwargs)
            options = _ops.named_options(args[3:], kwargs)
            if options["for_backward"]:
                self.differentiated = args[:3], options
            return _ops.attention_forward_fake(*args, **kwargs)
        if func is _cache_ops.attention_with_cache:
            self._record((*args[:3], None, None, *args[3:]), kwargs, _CACHE_SCHEDULE)
            return _cache_ops.attention_with_cache_fake(*args, **kwargs)
        if func is _cache_ops.attention_with_cache_:
            self._record(args, kwargs, _CACHE_SCHEDULE)
            return _cache_ops.attention_with_cache_writing_fake(*args, **kwargs)
        return func(*args, **kwargs)

    def _record(self, args: Any, kwargs: Any, schedule: Any = _ops.attention_schedule) -> None:
        self.schedule, *more = schedule(*args, **kwargs).split("\n")
        if more:
            self.arch, self.why_not_sm90, self.tiles = more
        self.dtype = args[0].dtype


def _level_in_use() -> tuple[str, str]:
    level = _C.active_cpu_level()
    runnable = [name for name, obstacle in _C.cpu_levels() if obstacle is None]
    highest = [name for name in runnable if name not in _C.emulated_levels][-1]
    if level == highest:
        return level, "the highest that runs here"
    by = "a call to set_cpu_level"
    if os.environ.get("FASTATTN_CPU_ISA") == level:
        by = f"FASTATTN_CPU_ISA={level}"
    emulated = level in _C.emulated_levels
    return level, f"{by} chooses it" if emulated else f"{by} holds it below {highest}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
