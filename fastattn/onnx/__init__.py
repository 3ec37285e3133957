r"""ONNX models of modules with fastattn's layers, of standard nodes alone.

    program = fastattn.onnx.export(model.eval(), (tokens,), "model.onnx")

Each op becomes what the standard has for it: ``Attention`` (opset 23), ``LayerNormalization``,
``RMSNormalization`` (23), ``RotaryEmbedding`` (23), ``Gelu`` (20), ``Swish`` (24; before it
``Sigmoid`` and ``Mul``). What no node has is made of others around it: a window, lengths, ALiBi,
offsets and the bottom-right corner become the mask of ``Attention`` (which has ``is_causal``, a
bias, the scale, softcap and grouped heads of its own); a sink scales its result, by the log-sum-exp
that nodes of their own compute; residuals, gates and castings are ``Add``, ``Mul`` and ``Cast``.
Sixteen-bit norms, rotations and gates are computed in float32, as in the kernels.

What cannot be said in ONNX is an error that names it: ``dropout_p`` above 0, packed sequences
(``cu_seqlens``), caches, and functions that write in place. A key that is hidden is hidden, but a
NaN in its value is not kept from the result; and a row that sees no key is 0, as the standard says
since Attention's erratum (runtimes before it may give NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

from fastattn.onnx import _attention, _rows

__all__ = ["decompose", "decompositions", "export"]

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
SWISH_OPSET = 24


def export(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int = OPSET,
    **options: Any,
) -> ONNXProgram:
    """``torch.onnx.export(dynamo=True)``, for models with layers or functions of fastattn.

    Args:
        model: a module, which is exported as it is: call ``eval()`` before; or what torch.export
            made of one.
        args, kwargs: what the module is called with, for shapes and dtypes.
        f: the file to write; None writes none.
        dynamic_shapes: as in torch.export; a string in place of a dimension is the name of one.
        opset_version: 23 or later.
        options: further arguments of torch.onnx.export. (``verify`` is none of them: torch cannot
            run what it exports here. Compare with the module itself.)

    Returns:
        The ONNXProgram, with ``model_proto`` and ``save``.

    Raises:
        ValueError: for what has no form in ONNX (see above), naming the option or the function.
    """
    if opset_version < OPSET:
        raise ValueError(f"opset_version: expected at least {OPSET}, got {opset_version}")
    if options.get("verify"):
        raise ValueError("verify: expected False: compare the result with the module, got True")
    if options.get("dynamo") is False:
        raise ValueError("dynamo: expected True, the exporter that knows custom ops, got False")
    if not isinstance(model, ExportedProgram):
        with torch.no_grad():  # nothing that only a backward pass needs
            given = None if kwargs is None else dict(kwargs)
            shapes = _without_names(dynamic_shapes)
            model = torch.export.export(model, args, given, dynamic_shapes=shapes)
    program = torch.onnx.export(
        decompose(model, opset_version),
        f=f,
        dynamic_shapes=dynamic_shapes,  # for the names
        opset_version=opset_version,
        **options | {"dynamo": True},
    )
    assert program is not None
    return program


def decompose(program: ExportedProgram, opset_version: int = OPSET) -> ExportedProgram:
    """The program with nodes of ONNX in place of fastattn's ops: for torch.onnx.export, not to run.

    Raises:
        ValueError: as export does.
    """
    table = decompositions(opset_version)
    for graph in program.graph_module.modules():
        if isinstance(graph, torch.fx.GraphModule):
            _require_all_in(table, graph.graph)
    decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


def decompositions(opset_version: int = OPSET) -> dict[OpOverload, Callable[..., Any]]:
    """For each op of fastattn that has a form in ONNX, the function that gives it."""
    table = {
        getattr(torch.ops.fastattn, name).default: getattr(module, name)
        for module in (_attention, _rows)
        for name in module.__all__
    }
    swish = {"swish": opset_version >= SWISH_OPSET}
    for op in (torch.ops.fastattn.activation, torch.ops.fastattn.gated_activation):
        table[op.default] = partial(table[op.default], **swish)
    return table


def _without_names(shapes: Any) -> Any:
    """dynamic_shapes for torch.export, which has no names in it."""
    if isinstance(shapes, str):
        return Dim.DYNAMIC
    if isinstance(shapes, Mapping):
        return {name: _without_names(x) for name, x in shapes.items()}
    if isinstance(shapes, list | tuple):
        return type(shapes)(map(_without_names, shapes))
    return shapes


def _require_all_in(table: Mapping[OpOverload, Any], graph: torch.fx.Graph) -> None:
    for called in graph.nodes:
        op = called.target
        if isinstance(op, OpOverload) and op.namespace == "fastattn" and op not in table:
            name = op._schema.name.removeprefix("fastattn::")
            raise ValueError(
                f"{_FUNCTIONS.get(name, name)}: expected a function with a form in ONNX, which has "
                "none for what writes in place or reads a cache"
            )


# What users call the ops that have no form in ONNX.
_FUNCTIONS = {"rope_": "apply_rope_", "rope_qk_": "apply_rope_qk_"} | {
    "attention_with_cache_": "attention_with_cache"
}
