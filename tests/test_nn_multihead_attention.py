"""nn.MultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import pickle

import pytest
import torch
from module_cases import check_module, same_parameters
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn._ops.attention import OPTIONS
from fastattn.nn import MultiheadAttention
from fastattn.testing import covering_sample, randn

AXES = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "num_heads": [1, 2, 3, 4],
    "head_dim": [1, 4, 8, 20],
    "bias": [True, False],
    "add_bias_kv": [False, True],
    "add_zero_attn": [False, True],
    "kdim": [None, 7],
    "vdim": [None, 12],
    "batch_first": [False, True],
    "batch": [None, 1, 3],
    "queries": [1, 2, 9, 33],
    "keys": [1, 5, 18, 40],
    "same": ["all", "key and value", "query and key", "none"],
    "key_padding_mask": [None, "bool", "float"],
    "attn_mask": [None, "bool", "float", "bool of each head", "float of each head"],
    "is_causal": [False, False, True],
    "need_weights": [False, True],
    "average_attn_weights": [True, False],
    "training": [False, True],
}


def fits(case):
    if case["same"] == "all" and (case["kdim"] or case["vdim"] or case["queries"] != case["keys"]):
        return False
    if case["same"] == "key and value" and case["kdim"] != case["vdim"]:
        return False
    if case["same"] == "query and key" and (case["kdim"] or case["queries"] != case["keys"]):
        return False
    return not (case["is_causal"] and case["attn_mask"] and "float" in case["attn_mask"])


def inputs_of(case, seed=0):
    """query, key, value and the masks by name; no query is without a key."""
    batch, queries, keys = case["batch"], case["queries"], case["keys"]
    embed_dim, dtype = case["num_heads"] * case["head_dim"], case["dtype"]

    def shape(length, features):
        if batch is None:
            return (length, features)
        return (batch, length, features) if case["batch_first"] else (length, batch, features)

    tensors = {"query": randn(*shape(queries, embed_dim), seed=seed, dtype=dtype)}
    if case["same"] not in ("all", "query and key"):
        size = shape(keys, case["kdim"] or embed_dim)
        tensors["key"] = randn(*size, seed=seed + 1, dtype=dtype)
    if case["same"] not in ("all", "key and value"):
        size = shape(keys, case["vdim"] or embed_dim)
        tensors["value"] = randn(*size, seed=seed + 2, dtype=dtype)

    def mask(kind, *shape):
        drawn = randn(*shape, seed=seed + len(shape))
        if kind.startswith("float"):
            return drawn.to(dtype)
        hidden = drawn > 0.5
        hidden[..., 0] = False
        return hidden

    if kind := case["key_padding_mask"]:
        tensors["key_padding_mask"] = mask(kind, *(() if batch is None else (batch,)), keys)
    if case["is_causal"] and case["attn_mask"]:
        tensors["attn_mask"] = causal(queries, keys)
    elif kind := case["attn_mask"]:
        leading = ((batch or 1) * case["num_heads"],) if "each" in kind else ()
        tensors["attn_mask"] = mask(kind, *leading, queries, keys)
    return tensors


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).triu(1)


def call(module, query, key=None, value=None, **options):
    """What is not given is the tensor before it: the very one, as a user passes it."""
    key = query if key is None else key
    return module(query, key, key if value is None else value, **options)


def modules_of(case):
    names = ("num_heads", "bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first")
    options = {name: case[name] for name in (*names, "dtype")}
    options["embed_dim"] = case["num_heads"] * case["head_dim"]
    ours, theirs = same_parameters(MultiheadAttention, torch.nn.MultiheadAttention, **options)
    return ours.train(case["training"]), theirs.train(case["training"])


@pytest.mark.parametrize("seed", range(4))
def test_outputs_weights_and_gradients_are_those_of_torch(seed):
    for number, case in enumerate(covering_sample(AXES, 50, seed, fits)):
        ours, theirs = modules_of(case)
        inputs = inputs_of(case, 100 * number)
        names = ("need_weights", "average_attn_weights")
        options = {name: case[name] for name in names}

        def our_call(module, case=case, options=options, **tensors):
            return call(module, **tensors, **options, is_causal=case["is_causal"])

        def their_call(module, case=case, options=options, **tensors):
            if case["is_causal"]:  # as a hint without a mask torch refuses it
                tensors["attn_mask"] = causal(case["queries"], case["keys"])
            return call(module, **tensors, **options)

        try:
            check_module(ours, theirs, our_call, inputs, their_call=their_call)
        except AssertionError as error:
            raise AssertionError(f"{case}\n{error}") from error


def both(**options):
    """(ours, theirs) after the same seed."""
    modules = []
    for kind in (MultiheadAttention, torch.nn.MultiheadAttention):
        torch.manual_seed(3)
        modules.append(kind(12, 3, **options))
        modules[-1].rng_state_after = torch.get_rng_state()
    return modules


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 5}, {"vdim": 5, "add_bias_kv": True}], ids=str
)
def test_it_begins_and_prints_as_the_class_of_torch(options):
    ours, theirs = both(**options)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert torch.equal(ours.rng_state_after, theirs.rng_state_after)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()


def test_copies_and_pickles_compute_the_same():
    module = MultiheadAttention(12, 3, add_bias_kv=True)
    x = randn(4, 2, 12, seed=0)
    want = module(x, x, x)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, x, x)[0], want)
    with torch.device("meta"):
        assert MultiheadAttention(12, 3)(*[torch.empty(4, 2, 12)] * 3)[1].shape == (2, 4, 4)


MASKS = {
    "no mask": {},
    "causal": {"is_causal": True},
    "padding": {"key_padding_mask": torch.arange(70) > torch.tensor([[40], [69]])},
    "float": {"attn_mask": randn(70, 70, seed=5)},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_has_the_same_bits_with_weights_and_without(level, masks, dtype):
    module = MultiheadAttention(32, 2, batch_first=True, add_zero_attn=True, dtype=dtype)
    for queries in (1, 3, 70):
        given = dict(MASKS[masks])
        x, y = randn(2, queries, 32, seed=1, dtype=dtype), randn(2, 70, 32, seed=2, dtype=dtype)
        if "attn_mask" in given:
            given["attn_mask"] = given["attn_mask"][:queries]
        for training in (True, False):
            with torch.set_grad_enabled(training):
                want, nothing = module.train(training)(x, y, y, **given, need_weights=False)
                assert nothing is None
                for average in (True, False):
                    got, _ = module(x, y, y, **given, average_attn_weights=average)
                    assert torch.equal(got, want)


def test_training_evaluation_and_no_grad_give_the_same(level):
    module, x = MultiheadAttention(32, 4), randn(50, 2, 32, seed=0)
    out, weights = module(x, x, x, is_causal=True)
    for other in (module.eval()(x, x, x, is_causal=True),):
        assert torch.equal(other[0], out) and torch.equal(other[1], weights)
    with torch.no_grad():
        other = module(x, x, x, is_causal=True)
    torch.testing.assert_close(other, (out.detach(), weights.detach()))
    assert other[0].is_contiguous()


class Recorder(TorchDispatchMode):
    """Keeps the name, the arguments and the largest result of every op."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((str(function), args, kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        sizes = [x.untyped_storage().nbytes() for x in found if isinstance(x, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result

    def count(self, *parts):
        return sum(any(part in name for part in parts) for name, _, _ in self.calls)


def test_self_attention_is_one_product_whose_parts_are_not_copied():
    module, x = MultiheadAttention(32, 4, batch_first=True), randn(2, 9, 32, seed=0)
    with torch.no_grad(), Recorder() as recorder:
        module(x, x, x, need_weights=False)
    assert recorder.count("mm") == 2
    assert recorder.count("clone", "copy", "cat", "contiguous") == 0
    with torch.no_grad(), Recorder() as recorder:
        module(x, randn(2, 9, 32, seed=1), x)
    assert recorder.count("mm") == 4


def test_averaged_weights_need_no_memory_for_all_heads():
    module, x = MultiheadAttention(32, 8, batch_first=True), randn(1, 100, 32, seed=0)
    with torch.no_grad(), Recorder() as recorder:
        module(x, x, x)
    assert recorder.largest < 2 * 100 * 100 * 4


def test_masks_are_never_expanded():
    module = MultiheadAttention(12, 3, batch_first=True)
    x, y = randn(2, 5, 12, seed=0), randn(2, 7, 12, seed=1)
    padding, pairs = torch.zeros(2, 7).bool(), torch.zeros(5, 7).bool()
    for given, name, shape in (
        ({"key_padding_mask": padding}, "mask", (2, 1, 1, 7)),
        ({"attn_mask": pairs}, "mask", (1, 1, 5, 7)),
        ({"attn_mask": pairs, "key_padding_mask": padding}, "mask", (2, 1, 5, 7)),
        ({"attn_mask": pairs.expand(6, 5, 7)}, "mask", (2, 3, 5, 7)),
        ({"attn_mask": pairs.float()}, "bias", (1, 1, 5, 7)),
        ({"attn_mask": pairs.float(), "key_padding_mask": padding}, "mask", (2, 1, 1, 7)),
    ):
        with torch.no_grad(), Recorder() as recorder:
            module(x, y, y, **given, need_weights=False)
        ((_, args, named),) = [call for call in recorder.calls if "attention_forward" in call[0]]
        assert (dict(zip(OPTIONS, args[3:], strict=False)) | named)[name].shape == shape


def test_is_causal_needs_no_mask_and_reads_none():
    for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
        module = MultiheadAttention(12, 3, **options)
        for queries, keys in ((5, 5), (3, 6), (6, 3)):
            x, y = randn(queries, 2, 12, seed=0), randn(keys, 2, 12, seed=1)
            want = module(x, y, y, attn_mask=causal(queries, keys))
            torch.testing.assert_close(module(x, y, y, is_causal=True), want)
            unread = torch.full((queries, keys), torch.nan)
            got = module(x, y, y, attn_mask=unread, is_causal=True)
            torch.testing.assert_close(got, want)


def test_what_padded_keys_hold_leaks_nowhere(level):
    padding = torch.arange(9) >= torch.tensor([[4], [9]])
    for options in ({}, {"add_bias_kv": True}, {"kdim": 12, "vdim": 7}):
        module = MultiheadAttention(12, 3, batch_first=True, **options)
        tensors = [randn(2, 5, 12, seed=0), randn(2, 9, 12, seed=1)]
        tensors.append(randn(2, 9, options.get("vdim", 12), seed=2))
        values = []
        for poison in (0.0, torch.nan):
            leaves = [x.clone() for x in tensors]
            for x in leaves[1:]:
                x[padding] = poison
            query = leaves[0].requires_grad_()
            out, weights = module(*leaves, key_padding_mask=padding)
            (gradient,) = torch.autograd.grad(out.sum() + weights.square().sum(), query)
            values.append((out, weights, gradient))
        torch.testing.assert_close(*values)


def test_a_query_that_sees_no_key_gets_zeros():
    module = MultiheadAttention(12, 3, batch_first=True)
    torch.nn.init.normal_(module.out_proj.bias)
    x = randn(2, 5, 12, seed=0).requires_grad_()
    padding = torch.tensor([[False] * 5, [True] * 5])
    out, weights = module(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(5, -1))
    assert (weights[1] == 0).all()
    (gradient,) = torch.autograd.grad(out[1].sum() + weights[1].sum(), x)
    assert (gradient == 0).all()
    zero = MultiheadAttention(12, 3, batch_first=True, add_zero_attn=True)
    assert (zero(x, x, x, key_padding_mask=padding)[1][1, :, -1] == 1).all()


@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)], ids=str)
def test_empty_tensors(sizes):
    batch, queries, keys = sizes
    for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
        module = MultiheadAttention(12, 3, batch_first=True, **options)
        x, y = torch.randn(batch, queries, 12), torch.randn(batch, keys, 12)
        out, weights = module(x.requires_grad_(), y, y)
        assert out.shape == (batch, queries, 12)
        assert weights.shape == (batch, queries, keys + len(options))
        out.sum().backward()
        assert x.grad.isfinite().all()


def test_any_strides():
    module = MultiheadAttention(12, 3, batch_first=True)
    x = randn(2, 5, 12, seed=0)
    want = module(x, x, x)
    wide = torch.full((2, 5, 24), torch.nan)
    wide[..., ::2] = x
    for view in (wide[..., ::2], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.clone().mT):
        torch.testing.assert_close(module(view, view, view), want)
    one = x[:1].expand(2, -1, -1)
    torch.testing.assert_close(module(one, one, one)[0][1], want[0][0])


def test_dropout_drops_weights_in_training_alone():
    module = MultiheadAttention(16, 2, dropout=0.3, batch_first=True)
    x = randn(1, 6, 16, seed=0).expand(1000, -1, -1)  # each draws its own mask
    want, weights = module.eval()(x, x, x)
    outs, given = module.train()(x, x, x)
    torch.testing.assert_close(given, weights)  # those before dropout
    assert (outs.mean(0) - want[0]).abs().max() < 6 * outs.std(0).max() / 1000**0.5
    assert outs.std(0).min() > 1e-3

    repeated = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        repeated.append(module(x, x, x, need_weights=False)[0])
    assert torch.equal(repeated[0], repeated[1])
    assert not torch.equal(repeated[0], repeated[2])
    module.dropout = 1.0
    torch.testing.assert_close(module(x, x, x)[0], module.out_proj.bias.expand_as(x))


def test_what_wraps_the_output_projection_counts():
    module, x = MultiheadAttention(12, 3), randn(4, 2, 12, seed=0)
    want, _ = module(x, x, x)
    module.out_proj = torch.nn.Sequential(module.out_proj, torch.nn.Tanh())
    assert torch.equal(module(x, x, x)[0], want.tanh())


def nested(*lengths, features=12, seed=0):
    sequences = [randn(n, features, seed=seed + i) for i, n in enumerate(lengths)]
    return torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "add_bias_kv": True}, {"kdim": 5}],
    ids=str,
)
def test_nested_tensors_give_what_each_sequence_gives(cross, is_causal, options):
    if "kdim" in options and not cross:
        pytest.skip("keys with features of their own are not the queries")
    module = MultiheadAttention(12, 3, **options)
    query, value = nested(3, 7, 1), nested(2, 4, 9, seed=9)
    key = nested(2, 4, 9, features=options.get("kdim", 12), seed=20) if cross else query
    value = value if cross else query
    inputs = [query] if not cross else [query, key, value]
    cotangent = randn(11, 12, seed=40)
    for average in (True, False):
        each = [
            module(*tensors, is_causal=is_causal, average_attn_weights=average)
            for tensors in zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
        ]
        out, weights = module(query, key, value, is_causal=is_causal, average_attn_weights=average)
        assert out.is_nested
        torch.testing.assert_close(out.values(), torch.cat([out for out, _ in each]))
        for n, (_, want) in enumerate(each):
            rows, columns = want.shape[-2:]
            if options.get("add_bias_kv") or options.get("add_zero_attn"):
                torch.testing.assert_close(weights[n, ..., :rows, :].sum(-1), want.sum(-1))
            else:
                torch.testing.assert_close(weights[n, ..., :rows, :columns], want)
                assert (weights[n, ..., columns:] == 0).all()
            assert (weights[n, ..., rows:, :] == 0).all()
        got = torch.autograd.grad((out.values() * cotangent).sum(), inputs, retain_graph=True)
        loss = (torch.cat([out for out, _ in each]) * cotangent).sum()
        for a, b in zip(got, torch.autograd.grad(loss, inputs), strict=True):
            torch.testing.assert_close(a.values(), b.values())
        with torch.no_grad():
            again, _ = module(query, key, value, is_causal=is_causal, need_weights=False)
        torch.testing.assert_close(again.values(), out.values().detach())


def test_autocast_gives_the_dtypes_of_torch():
    ours, theirs = both()
    x = randn(4, 2, 12, seed=0)
    padding = torch.zeros(2, 4)
    for options in ({}, {"need_weights": False}, {"key_padding_mask": padding}):
        with torch.autocast("cpu", torch.bfloat16):
            got, want = (module(x, x, x, **options) for module in (ours, theirs))
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or a.dtype == b.dtype
        torch.testing.assert_close(got[0], want[0], rtol=0.02, atol=0.02)


X, Y = randn(5, 2, 12, seed=0), randn(7, 2, 12, seed=1)
NESTED = nested(2, 3)
MODULE = MultiheadAttention(12, 3)
REFUSED = [
    (lambda: MultiheadAttention(12, 5), ValueError, "embed_dim"),
    (lambda: MultiheadAttention(0, 1), ValueError, "embed_dim"),
    (lambda: MultiheadAttention(12, 0), ValueError, "num_heads"),
    (lambda: MultiheadAttention(12, 3, dropout=1.5), ValueError, "dropout"),
    (lambda: MODULE([X], X, X), TypeError, "query"),
    (lambda: MODULE(X[0, 0], X, X), ValueError, "query"),
    (lambda: MODULE(X[..., :8], X, X), ValueError, "query"),
    (lambda: MODULE(X.double(), X, X), TypeError, "query"),
    (lambda: MODULE(X.to("meta"), X, X), ValueError, "query"),
    (lambda: MODULE(X, None, X), TypeError, "key"),
    (lambda: MODULE(X, X[0], X), ValueError, "key"),
    (lambda: MODULE(X, X[:, :1], X), ValueError, "key"),
    (lambda: MODULE(X, X.half(), X), TypeError, "key"),
    (lambda: MODULE(X, NESTED, X), TypeError, "key"),
    (lambda: MODULE(X, X, X[..., :3]), ValueError, "value"),
    (lambda: MODULE(X, Y, X), ValueError, "value"),
    (lambda: MODULE(X, Y, Y, key_padding_mask=torch.zeros(7, 2)), ValueError, "key_padding_mask"),
    (lambda: MODULE(X, Y, Y, key_padding_mask=torch.ones(2, 7).int()), TypeError, "key_padding"),
    (lambda: MODULE(X, Y, Y, key_padding_mask=[True]), TypeError, "key_padding_mask"),
    (lambda: MODULE(X[:, 0], Y[:, 0], Y[:, 0], torch.zeros(1, 7)), ValueError, "key_padding_mask"),
    (lambda: MODULE(X, Y, Y, attn_mask=torch.zeros(7, 5)), ValueError, "attn_mask"),
    (lambda: MODULE(X, Y, Y, attn_mask=torch.zeros(2, 5, 7)), ValueError, "attn_mask"),
    (lambda: MODULE(X, Y, Y, attn_mask=torch.zeros(2, 3, 5, 7)), ValueError, "attn_mask"),
    (lambda: MODULE(X, Y, Y, attn_mask=torch.zeros(5, 7).long()), TypeError, "attn_mask"),
    (lambda: MODULE(X, Y, Y, attn_mask=torch.zeros(5, 7, device="meta")), ValueError, "attn_mask"),
    (lambda: MODULE(X, Y, Y, attn_mask=torch.zeros(7, 5), is_causal=True), ValueError, "attn_mask"),
    (lambda: MODULE(NESTED, X, X), TypeError, "key"),
    (lambda: MODULE(NESTED, NESTED, nested(3, 2)), ValueError, "value"),
    (lambda: MODULE(NESTED, nested(3), nested(3)), ValueError, "key"),
    (lambda: MODULE(NESTED, nested(2, 3, features=5), NESTED), ValueError, "key"),
    (lambda: MODULE(*[NESTED] * 3, key_padding_mask=X), ValueError, "key_padding_mask"),
    (lambda: MODULE(*[NESTED] * 3, attn_mask=X), ValueError, "attn_mask"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_input_is_refused_by_name(case):
    function, error, name = REFUSED[case]
    with pytest.raises(error, match=rf"^{name}\w*: expected"):
        function()
