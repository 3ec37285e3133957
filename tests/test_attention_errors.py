"""Wrong calls raise the right exception, whose message names the argument."""

import math

import pytest
import torch

import fastattn.functional as fa

f32, f64, bf16, i64 = torch.float32, torch.float64, torch.bfloat16, torch.int64


def zeros(*shape, dtype=f32, **kwargs):
    return torch.zeros(shape, dtype=dtype, **kwargs)


def dense():
    """2 sequences, 6 query heads on 3, 5 queries, 7 keys, head_dim 8 and 4."""
    return {"query": zeros(2, 6, 5, 8), "key": zeros(2, 3, 7, 8), "value": zeros(2, 3, 7, 4)}


def packed():
    """Sequences of 3 and 2 queries, 4 and 3 keys."""
    return {
        "query": zeros(5, 6, 8),
        "key": zeros(7, 3, 8),
        "value": zeros(7, 3, 4),
        "cu_seqlens_q": torch.tensor([0, 3, 5]),
        "cu_seqlens_k": torch.tensor([0, 4, 7]),
    }


def seen():
    return {"query": zeros(2, 6, 5, 8), "key": zeros(2, 3, 7, 8), "lse": zeros(2, 6, 5)}


def parts():
    return {
        "out_a": zeros(2, 6, 5, 4),
        "lse_a": zeros(2, 6, 5),
        "out_b": zeros(2, 6, 5, 4),
        "lse_b": zeros(2, 6, 5),
    }


# (function, its right arguments, what is changed, exception, argument that the message names)
CASES = [
    (fa.attention, dense, {"query": [1.0]}, TypeError, "query"),
    (fa.attention, dense, {"key": None}, TypeError, "key"),
    (fa.attention, dense, {"query": zeros(2, 6, 5, 8, dtype=i64)}, TypeError, "query"),
    (fa.attention, dense, {"query": zeros(2, 6, 5, 8, dtype=torch.complex64)}, TypeError, "query"),
    (fa.attention, dense, {"key": zeros(2, 3, 7, 8, dtype=bf16)}, TypeError, "key"),
    (fa.attention, dense, {"value": zeros(2, 3, 7, 4, dtype=f64)}, TypeError, "value"),
    (fa.attention, dense, {"query": zeros(6, 8)}, ValueError, "query"),
    (fa.attention, dense, {"query": zeros()}, ValueError, "query"),
    (fa.attention, dense, {"key": zeros(3, 7, 8)}, ValueError, "key"),
    (fa.attention, dense, {"key": zeros(1, 3, 7, 8)}, ValueError, "key"),
    (fa.attention, dense, {"key": zeros(2, 3, 7, 9)}, ValueError, "key"),
    (fa.attention, dense, {"key": zeros(2, 4, 7, 8)}, ValueError, "key"),
    (fa.attention, dense, {"key": zeros(2, 0, 7, 8)}, ValueError, "key"),
    (fa.attention, dense, {"value": zeros(2, 3, 6, 4)}, ValueError, "value"),
    (fa.attention, dense, {"value": zeros(2, 6, 7, 4)}, ValueError, "value"),
    (fa.attention, dense, {"value": zeros(3, 3, 7, 4)}, ValueError, "value"),
    (fa.attention, dense, {"value": zeros(2, 3, 7, 0)}, ValueError, "value"),
    (fa.attention, dense, {"value": zeros(2, 3, 7, 513)}, ValueError, "value"),
    (
        fa.attention,
        dense,
        {"query": zeros(2, 6, 5, 0), "key": zeros(2, 3, 7, 0)},
        ValueError,
        "query",
    ),
    (
        fa.attention,
        dense,
        {"query": zeros(2, 6, 5, 520), "key": zeros(2, 3, 7, 520)},
        ValueError,
        "query",
    ),
    (fa.attention, dense, {"key": zeros(2, 3, 7, 8, device="meta")}, ValueError, "key"),
    (fa.attention, dense, {"value": zeros(2, 3, 7, 4).to_sparse()}, TypeError, "value"),
    (fa.attention, dense, {"causal": "bottom"}, ValueError, "causal"),
    (fa.attention, dense, {"causal": 1}, TypeError, "causal"),
    (fa.attention, dense, {"causal": None}, TypeError, "causal"),
    (fa.attention, dense, {"window": 4}, TypeError, "window"),
    (fa.attention, dense, {"window": (4,)}, ValueError, "window"),
    (fa.attention, dense, {"window": (-1, 0)}, ValueError, "window"),
    (fa.attention, dense, {"window": (0, -5)}, ValueError, "window"),
    (fa.attention, dense, {"window": (1.5, 0)}, TypeError, "window"),
    (fa.attention, dense, {"window": (True, 0)}, TypeError, "window"),
    (fa.attention, dense, {"mask": zeros(5, 7)}, TypeError, "mask"),
    (fa.attention, dense, {"mask": "causal"}, TypeError, "mask"),
    (fa.attention, dense, {"mask": zeros(5, 6, dtype=torch.bool)}, ValueError, "mask"),
    (fa.attention, dense, {"mask": zeros(3, 1, 5, 7, dtype=torch.bool)}, ValueError, "mask"),
    (fa.attention, dense, {"mask": zeros(1, 2, 6, 5, 7, dtype=torch.bool)}, ValueError, "mask"),
    (
        fa.attention,
        dense,
        {"mask": zeros(5, 7, dtype=torch.bool, device="meta")},
        ValueError,
        "mask",
    ),
    (fa.attention, dense, {"bias": zeros(5, 7, dtype=torch.bool)}, TypeError, "bias"),
    (fa.attention, dense, {"bias": zeros(5, 7, dtype=i64)}, TypeError, "bias"),
    (fa.attention, dense, {"bias": zeros(4, 7)}, ValueError, "bias"),
    (fa.attention, dense, {"bias": zeros(3, 5, 7)}, ValueError, "bias"),
    (fa.attention, dense, {"query_lengths": torch.tensor([5])}, ValueError, "query_lengths"),
    (fa.attention, dense, {"query_lengths": torch.tensor([5, 6])}, ValueError, "query_lengths"),
    (fa.attention, dense, {"query_lengths": zeros(2)}, TypeError, "query_lengths"),
    (fa.attention, dense, {"query_lengths": [5, 5]}, TypeError, "query_lengths"),
    (fa.attention, dense, {"key_lengths": torch.tensor([8, 1])}, ValueError, "key_lengths"),
    (fa.attention, dense, {"key_lengths": torch.tensor([-1, 1])}, ValueError, "key_lengths"),
    (fa.attention, dense, {"key_lengths": torch.tensor([[7, 7]])}, ValueError, "key_lengths"),
    (fa.attention, dense, {"key_lengths": torch.tensor([7, 7, 7])}, ValueError, "key_lengths"),
    (
        fa.attention,
        dense,
        {"key_lengths": torch.tensor([2**40, 7])},
        ValueError,
        "key_lengths",
    ),
    (fa.attention, dense, {"alibi_slopes": zeros(3)}, ValueError, "alibi_slopes"),
    (fa.attention, dense, {"alibi_slopes": zeros(3, 6)}, ValueError, "alibi_slopes"),
    (fa.attention, dense, {"alibi_slopes": zeros(6, dtype=i64)}, TypeError, "alibi_slopes"),
    (fa.attention, dense, {"alibi_slopes": [0.5] * 6}, TypeError, "alibi_slopes"),
    (
        fa.attention,
        dense,
        {"alibi_slopes": zeros(6, requires_grad=True)},
        ValueError,
        "alibi_slopes",
    ),
    (fa.attention, dense, {"sink": zeros(3)}, ValueError, "sink"),
    (fa.attention, dense, {"sink": zeros(2, 6)}, ValueError, "sink"),
    (fa.attention, dense, {"sink": zeros(6, dtype=torch.int32)}, TypeError, "sink"),
    (fa.attention, dense, {"softcap": 0.0}, ValueError, "softcap"),
    (fa.attention, dense, {"softcap": -1.0}, ValueError, "softcap"),
    (fa.attention, dense, {"softcap": math.inf}, ValueError, "softcap"),
    (fa.attention, dense, {"softcap": math.nan}, ValueError, "softcap"),
    (fa.attention, dense, {"softcap": "30"}, TypeError, "softcap"),
    (fa.attention, dense, {"dropout_p": 1.1}, ValueError, "dropout_p"),
    (fa.attention, dense, {"dropout_p": -0.1}, ValueError, "dropout_p"),
    (fa.attention, dense, {"dropout_p": math.nan}, ValueError, "dropout_p"),
    (fa.attention, dense, {"dropout_p": None}, TypeError, "dropout_p"),
    (fa.attention, dense, {"scale": math.nan}, ValueError, "scale"),
    (fa.attention, dense, {"scale": math.inf}, ValueError, "scale"),
    (fa.attention, dense, {"scale": "1"}, TypeError, "scale"),
    (fa.attention, dense, {"query_offset": 0.5}, TypeError, "query_offset"),
    (fa.attention, dense, {"key_offset": "0"}, TypeError, "key_offset"),
    (fa.attention, dense, {"key_offset": 2**70}, (TypeError, ValueError), "key_offset"),
    (fa.attention, dense, {"layout": "sbhd"}, ValueError, "layout"),
    (fa.attention, dense, {"deterministic": "yes"}, TypeError, "deterministic"),
    (fa.attention_varlen, packed, {"deterministic": 1}, TypeError, "deterministic"),
    (fa.attention, dense, {"layout": "bshd"}, ValueError, "key|value"),
    (fa.attention, dense, {"attn_mask": None}, TypeError, "attn_mask"),
    (fa.attention_varlen, packed, {"query": zeros(1, 5, 6, 8)}, ValueError, "query"),
    (fa.attention_varlen, packed, {"value": zeros(6, 3, 4)}, ValueError, "value"),
    (fa.attention_varlen, packed, {"key": zeros(7, 4, 8)}, ValueError, "key"),
    (fa.attention_varlen, packed, {"cu_seqlens_q": [0, 3, 5]}, TypeError, "cu_seqlens_q"),
    (fa.attention_varlen, packed, {"cu_seqlens_q": zeros(3)}, TypeError, "cu_seqlens_q"),
    (
        fa.attention_varlen,
        packed,
        {"cu_seqlens_q": torch.tensor([0, 4, 3])},
        ValueError,
        "cu_seqlens_q",
    ),
    (
        fa.attention_varlen,
        packed,
        {"cu_seqlens_q": torch.tensor([0, 3, 6])},
        ValueError,
        "cu_seqlens_q",
    ),
    (
        fa.attention_varlen,
        packed,
        {"cu_seqlens_q": torch.tensor([1, 3, 5])},
        ValueError,
        "cu_seqlens_q",
    ),
    (
        fa.attention_varlen,
        packed,
        {"cu_seqlens_q": torch.tensor([0, 3, 5])[None]},
        ValueError,
        "cu_seqlens_q",
    ),
    (
        fa.attention_varlen,
        packed,
        {"cu_seqlens_k": torch.tensor([0, -4, 7])},
        ValueError,
        "cu_seqlens_k",
    ),
    (
        fa.attention_varlen,
        packed,
        {"cu_seqlens_k": torch.tensor([0, 2**40, 7])},
        ValueError,
        "cu_seqlens_k",
    ),
    (
        fa.attention_varlen,
        packed,
        {"cu_seqlens_k": torch.tensor([0, 7])},
        ValueError,
        "cu_seqlens_k",
    ),
    (
        fa.attention_varlen,
        packed,
        {"cu_seqlens_k": torch.zeros(0, dtype=i64), "cu_seqlens_q": torch.zeros(0, dtype=i64)},
        ValueError,
        "cu_seqlens_q",
    ),
    (fa.attention_varlen, packed, {"max_seqlen_q": 2}, ValueError, "max_seqlen_q"),
    (fa.attention_varlen, packed, {"max_seqlen_k": "4"}, TypeError, "max_seqlen_k"),
    (
        fa.attention_varlen,
        packed,
        {"key_lengths": torch.tensor([5, 1])},
        ValueError,
        "key_lengths",
    ),
    (
        fa.attention_varlen,
        packed,
        {"mask": zeros(2, 1, 3, 3, dtype=torch.bool)},
        ValueError,
        "mask",
    ),
    (fa.attention_weights, seen, {"lse": zeros(2, 6, 4)}, ValueError, "lse"),
    (fa.attention_weights, seen, {"lse": zeros(2, 6, 5, dtype=bf16)}, TypeError, "lse"),
    (fa.attention_weights, seen, {"rows": [5]}, ValueError, "rows"),
    (fa.attention_weights, seen, {"rows": [-6]}, ValueError, "rows"),
    (fa.attention_weights, seen, {"rows": [0.5]}, TypeError, "rows"),
    (fa.attention_weights, seen, {"rows": torch.tensor([[0]])}, ValueError, "rows"),
    (fa.attention_weights, seen, {"heads": torch.tensor([6])}, ValueError, "heads"),
    (fa.attention_weights, seen, {"key": zeros(2, 4, 7, 8)}, ValueError, "key"),
    (fa.attention_column_sums, seen, {"lse": zeros(2, 5, 6)}, ValueError, "lse"),
    (fa.attention_column_sums, seen, {"window": (-2, 0)}, ValueError, "window"),
    (fa.merge_attention, parts, {"lse_b": zeros(2, 5, 6)}, ValueError, "lse_b"),
    (fa.merge_attention, parts, {"out_b": zeros(2, 6, 5, 3)}, ValueError, "out_b"),
    (fa.merge_attention, parts, {"out_a": None}, TypeError, "out_a"),
    (fa.merge_attention, parts, {"layout": "packed"}, ValueError, "layout"),
]


def describe(case):
    function, _, change, *_ = case
    given = (f"{n}={tuple(x.shape) if torch.is_tensor(x) else x}" for n, x in change.items())
    return f"{function.__name__} {' '.join(given)}"


def test_the_right_arguments_are_accepted():
    for function, arguments in {(case[0], case[1]) for case in CASES}:
        function(**arguments())


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_a_wrong_argument_is_named(case):
    function, arguments, change, exception, name = case
    call = arguments() | change
    before = {n: x.clone() for n, x in call.items() if torch.is_tensor(x) and not x.is_meta}
    with pytest.raises(exception, match=rf"\b({name})\b") as caught:
        function(**call)
    assert type(caught.value) in (TypeError, ValueError)
    assert len(str(caught.value)) > len(name) + 10, "the message says nothing"
    for n, x in before.items():
        assert torch.equal(x.to_dense(), call[n].to_dense()), f"{n} was written"


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_errors_are_the_same_when_a_gradient_is_needed(needs_gradient):
    query = zeros(2, 6, 5, 8, requires_grad=needs_gradient)
    with pytest.raises(ValueError, match=r"^key:"):
        fa.attention(query, zeros(2, 4, 7, 8), zeros(2, 4, 7, 8))
    with pytest.raises(ValueError, match=r"^key_lengths:"):
        fa.attention(query, zeros(2, 3, 7, 8), zeros(2, 3, 7, 8), key_lengths=torch.tensor([9, 1]))


def test_the_ops_check_what_reaches_them_past_the_functions():
    query, key, value = dense().values()
    forward = torch.ops.fastattn.attention_forward
    for change in (
        {"value": zeros(2, 3, 6, 4)},
        {"key": zeros(2, 3, 7, 9)},
        {"mask": zeros(9, 9, dtype=torch.bool)},
        {"bias": zeros(9, 9)},
        {"sink": zeros(5)},
        {"philox": torch.zeros(1, dtype=i64), "dropout_p": 0.5},
        {"cu_seqlens_q": torch.tensor([0, 5])},
        {"window_left": -7},
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            forward(**({"query": query, "key": key, "value": value} | change))


def test_the_backward_op_checks_what_the_forward_pass_saved():
    query, key, value = dense().values()
    out, lse = torch.ops.fastattn.attention_forward(query, key, value)
    right = {"dout": out, "dlse": None, "query": query, "key": key, "value": value}
    right |= {"out": out, "lse": lse, "need_dquery": True, "need_dkey_dvalue": True}
    right |= {"need_dbias": False, "need_dsink": False}
    torch.ops.fastattn.attention_backward(**right)
    for change in (
        {"dout": zeros(2, 6, 5, 3)},
        {"lse": zeros(2, 6, 4)},
        {"out": zeros(2, 6, 4, 4)},
        {"dlse": zeros(2, 6, 5, dtype=f64)},
        {"need_dbias": True},
        {"need_dsink": True},
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.fastattn.attention_backward(**(right | change))
