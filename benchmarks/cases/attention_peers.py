"""What computes attention on this machine, besides fastattn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cases.base import DTYPES, Forward, Peer, Unavailable, available_memory, compiled, table

if TYPE_CHECKING:
    from cases.attention import AttentionCase, AttentionInputs


def ours(case: AttentionCase) -> Forward:
    from fastattn.functional import attention

    causal = "bottom_right" if case.is_causal else False

    def forward(x: AttentionInputs) -> Tensor:
        return attention(
            x.query, x.key, x.value, causal=causal, key_lengths=x.key_lengths, bias=x.bias
        )

    return forward


def naive_weights(x: AttentionInputs) -> Tensor:
    """softmax(scale Q K^T + bias, masked): (B, H, Sq, Sk). KV heads are repeated for a group."""
    group = x.query.shape[1] // x.key.shape[1]
    key = x.key.repeat_interleave(group, 1) if group > 1 else x.key
    scores = (x.query @ key.transpose(-1, -2)) * (1 / math.sqrt(x.query.shape[-1]))
    if x.bias is not None:
        scores = scores + x.bias
    if x.visible is not None:
        scores = scores.masked_fill(~x.visible, -math.inf)
    return torch.softmax(scores, -1)


def naive(x: AttentionInputs) -> Tensor:
    """Attention as one writes it by hand, the whole score matrix in memory."""
    group = x.query.shape[1] // x.value.shape[1]
    value = x.value.repeat_interleave(group, 1) if group > 1 else x.value
    return naive_weights(x) @ value


def _eager(case: AttentionCase) -> Forward:
    matrices = 5 if case.backward else 3
    size = DTYPES[case.dtype].itemsize
    needed = matrices * case.batch * case.heads * case.queries * case.keys * size
    if needed > 0.7 * available_memory():
        raise Unavailable(f"the score matrices need {needed / 2**30:.0f} GiB of memory")
    return naive


def sdpa(case: AttentionCase) -> Forward:
    square = (
        case.queries == case.keys
    )  # torch's is_causal is the top-left corner: the same only here
    grouped = case.heads != case.heads_kv

    def forward(x: AttentionInputs) -> Tensor:
        mask = x.bias if x.bias is not None else x.visible
        if case.is_causal and square:
            mask = None
        return F.scaled_dot_product_attention(
            x.query, x.key, x.value, mask, is_causal=case.is_causal and square, enable_gqa=grouped
        )

    return forward


def _compiled(case: AttentionCase) -> Forward:
    _eager(case)  # compiled or not, it may fall back to whole score matrices
    return compiled(naive)


def _onnxruntime(case: AttentionCase) -> Forward:
    """The ONNX operator Attention (opset 24), through onnxruntime's CPU provider."""
    import onnxruntime
    from onnx import TensorProto, helper

    if case.backward:
        raise Unavailable("inference only")
    if case.dtype == "bf16":
        raise Unavailable("takes no bfloat16 through numpy")
    element = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[case.dtype]
    square = case.queries == case.keys
    if case.mask == "none" or (case.is_causal and square):
        mask = ""
    else:
        mask = "bias" if case.mask == "bias" else "visible"
    names = ["query", "key", "value"] + ([mask] if mask else [])
    types = [element] * 3 + [TensorProto.BOOL if mask == "visible" else element]
    node = helper.make_node("Attention", names, ["out"], is_causal=int(case.is_causal and not mask))
    values = [helper.make_tensor_value_info(n, t, [None] * 4) for n, t in zip(names, types)]
    out = helper.make_tensor_value_info("out", element, [None] * 4)
    graph = helper.make_graph([node], "attention", values, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    masks = {}  # the operator wants all queries written out: once, and not in the time of a call

    def forward(x: AttentionInputs) -> Tensor:
        feed = {"query": x.query.numpy(), "key": x.key.numpy(), "value": x.value.numpy()}
        if mask:
            if mask not in masks:
                tensor = x.bias if mask == "bias" else x.visible
                tensor = tensor.view((1,) * (4 - tensor.dim()) + tensor.shape)
                written_out = tensor.expand(-1, -1, case.queries, -1).contiguous()
                masks[mask] = written_out.numpy()
            feed[mask] = masks[mask]
        return torch.from_numpy(session.run(None, feed)[0])

    return forward


def _openvino(case: AttentionCase) -> Forward:
    """OpenVINO's fused ScaledDotProductAttention on its CPU plugin; tensors are not copied."""
    import openvino as ov
    from openvino import opset13 as ops

    if case.backward:
        raise Unavailable("inference only")
    if case.heads != case.heads_kv:
        raise Unavailable("its operator has no grouped heads")
    element = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16, "fp16": ov.Type.f16}[case.dtype]
    shapes = [
        (case.batch, case.heads, n, case.head_dim) for n in (case.queries, case.keys, case.keys)
    ]
    parameters = [ops.parameter(shape, element) for shape in shapes]
    arguments = list(parameters)
    if case.mask == "bias":
        arguments.append(ops.parameter((1, case.heads, case.queries, case.keys), element))
    if case.mask == "padded":
        arguments.append(ops.parameter((case.batch, 1, 1, case.keys), ov.Type.boolean))
    node = ops.scaled_dot_product_attention(*arguments, causal=case.is_causal)
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": element,
    }
    model = ov.Model([node.output(0)], arguments)
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()

    def shared(tensor: Tensor) -> ov.Tensor:
        if tensor.dtype == torch.bfloat16:
            return ov.Tensor(tensor.view(torch.int16).numpy(), tensor.shape, ov.Type.bf16)
        return ov.Tensor(tensor.numpy(), shared_memory=True)

    def forward(x: AttentionInputs) -> Tensor:
        extra = [t for t in (x.bias, x.visible if case.mask == "padded" else None) if t is not None]
        for i, tensor in enumerate((x.query, x.key, x.value, *extra)):
            request.set_input_tensor(i, shared(tensor.contiguous()))
        request.infer()
        out = request.get_output_tensor(0).data
        if case.dtype == "bf16":
            return torch.from_numpy(out.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(out)

    return forward


PEERS = table(
    Peer("fastattn", "fastattn", ours, "fastattn.functional.attention"),
    Peer("sdpa", "sdpa", sdpa, "torch.nn.functional.scaled_dot_product_attention"),
    Peer("eager", "eager", _eager, "softmax(Q K^T) V by hand, eager"),
    Peer("compile", "compile", _compiled, "torch.compile(the same by hand, dynamic=False)"),
    Peer("onnxruntime", "ort", _onnxruntime, "onnxruntime, ONNX Attention", own_threads=True),
    Peer("openvino", "ov", _openvino, "OpenVINO, ScaledDotProductAttention", own_threads=True),
)
