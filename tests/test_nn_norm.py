"""nn.LayerNorm, nn.RMSNorm and nn.GELU against the classes of torch.nn."""

import copy
import pickle

import pytest
import torch
from attention_options import is_on_cuda
from module_cases import check_module, same_parameters

import fastattn.functional as fa
from fastattn import nn
from fastattn.testing import covering_sample, randn, restride

COMMON = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "shape": [(5,), (3, 16), (2, 7, 24), (2, 3, 5, 130), (4, 0, 8), (1, 2)],
    "strides": ["contiguous", "transposed", "strided", "guarded"],
    "training": [True, False],
}
NORM = COMMON | {"dims": [1, 2], "eps": [None, 1e-6, 0.1], "elementwise_affine": [True, False]}
AXES = {
    "LayerNorm": NORM | {"bias": [True, False]},
    "RMSNorm": NORM,
    "GELU": COMMON | {"approximate": ["none", "tanh"]},
}


def fits(case):
    return case.get("dims", 1) <= len(case["shape"]) and (
        case["strides"] == "contiguous" or len(case["shape"]) > 2
    )


def options_of(case):
    names = ("elementwise_affine", "bias", "approximate")
    options = {name: case[name] for name in names if name in case}
    if "dims" in case:
        options["normalized_shape"] = case["shape"][-case["dims"] :]
        options["dtype"] = case["dtype"]
        if case["eps"] is not None:
            options["eps"] = case["eps"]
    return options


def statistics_are_constants(module, input):
    if isinstance(module, torch.nn.GELU):
        return module(input)
    dims = tuple(range(-len(module.normalized_shape), 0))
    centre = input.detach().mean(dims, keepdim=True) if hasattr(module, "bias") else 0.0
    eps = torch.finfo(input.dtype).eps if module.eps is None else module.eps
    variance = (input.detach() - centre).square().mean(dims, keepdim=True)
    out = (input - centre) * (variance + eps).rsqrt()
    out = out if module.weight is None else out * module.weight
    return out if getattr(module, "bias", None) is None else out + module.bias


@pytest.mark.parametrize("name", AXES)
def test_outputs_and_gradients_are_those_of_torch(level, name):
    """At least 200 combinations over the levels of any machine."""
    axes = AXES[name]
    if is_on_cuda(level):
        axes = axes | {"dtype": [x for x in axes["dtype"] if x != torch.float64]}
    for number, case in enumerate(covering_sample(axes, 200, 0, fits)):
        ours, theirs = same_parameters(
            getattr(nn, name), getattr(torch.nn, name), **options_of(case)
        )
        ours.train(case["training"])
        theirs.train(case["training"])
        x = restride(randn(*case["shape"], seed=number, dtype=case["dtype"]), case["strides"])
        try:
            check_module(
                *(ours, theirs, lambda module, input: module(input), {"input": x}),
                uncancelled=statistics_are_constants,
            )
        except AssertionError as error:
            raise AssertionError(f"{case}\n{error}") from error


MODULES = [
    ("LayerNorm", {"normalized_shape": 16}),
    ("LayerNorm", {"normalized_shape": (3, 16), "bias": False, "eps": 0.1}),
    ("RMSNorm", {"normalized_shape": 16, "eps": 1e-6}),
    ("RMSNorm", {"normalized_shape": (3, 16), "elementwise_affine": False}),
    ("GELU", {}),
    ("GELU", {"approximate": "tanh"}),
]


@pytest.mark.parametrize("name, options", MODULES, ids=str)
def test_it_begins_prints_copies_and_pickles_as_the_class_of_torch(name, options):
    ours, theirs = getattr(nn, name)(**options), getattr(torch.nn, name)(**options)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    x = randn(2, 3, 16, seed=0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), ours(x))
    with torch.device("meta"):
        assert getattr(nn, name)(**options)(torch.empty(2, 3, 16)).is_meta


@pytest.mark.parametrize("casting", ["fp32", "llama", "gemma"])
def test_the_castings_of_rms_norm(casting):
    norm = nn.RMSNorm(16, 1e-6, casting=casting)
    x = randn(3, 16, seed=0, dtype=torch.bfloat16)
    assert torch.equal(norm.weight, torch.full((16,), 0.0 if casting == "gemma" else 1.0))
    torch.nn.init.normal_(norm.weight)
    assert torch.equal(norm(x), fa.rms_norm(x, 16, norm.weight, 1e-6, casting=casting))
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other(x), norm(x))
    assert ("casting" in norm.extra_repr()) == (casting != "fp32")
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.full((16,), 0.0 if casting == "gemma" else 1.0))
    assert nn.RMSNorm(16, elementwise_affine=False, casting=casting)(x).shape == x.shape


@pytest.mark.parametrize("name, options", MODULES, ids=str)
def test_nested_tensors_give_what_each_sequence_gives(name, options):
    module = getattr(nn, name)(**options)
    sequences = [randn(n, 3, 16, seed=n) for n in (4, 1, 7)]
    x = torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
    out = module(x)
    assert out.is_nested
    assert out.shape == x.shape
    each = torch.cat([module(sequence) for sequence in x.unbind()])
    torch.testing.assert_close(out.values(), each)
    cotangent = randn(12, 3, 16, seed=9)
    (got,) = torch.autograd.grad((out.values() * cotangent).sum(), x)
    (want,) = torch.autograd.grad((each * cotangent).sum(), x)
    torch.testing.assert_close(got.values(), want.values())


def test_nested_tensors_with_gaps_between_their_sequences():
    values = torch.full((10, 16), torch.nan)
    values[1:4], values[6:8] = randn(3, 16, seed=0), randn(2, 16, seed=1)
    offsets, lengths = torch.tensor([1, 6, 10]), torch.tensor([3, 2])
    x = torch.nested.nested_tensor_from_jagged(values, offsets, lengths)
    norm = nn.LayerNorm(16)
    out = norm(x)
    torch.testing.assert_close(out.values(), norm(torch.cat([values[1:4], values[6:8]])))


@pytest.mark.parametrize("name, options", MODULES, ids=str)
def test_autocast_leaves_the_dtype_that_torch_leaves(name, options):
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(2, 3, 16, seed=0, dtype=dtype)
        given = {} if name == "GELU" else {"dtype": dtype}
        with torch.autocast("cpu", torch.bfloat16):
            got = getattr(nn, name)(**options, **given)(x)
            want = getattr(torch.nn, name)(**options, **given)(x)
        assert got.dtype == want.dtype


X = randn(3, 16, seed=0)
NESTED = torch.nested.nested_tensor([X, X], layout=torch.jagged)
STRIDED = torch.nested.nested_tensor([X, X])
REFUSED = [
    (lambda: nn.LayerNorm(8)(X), ValueError, "normalized_shape"),
    (lambda: nn.LayerNorm((6, 16))(NESTED), ValueError, "normalized_shape"),
    (lambda: nn.LayerNorm(16)([1.0]), TypeError, "input"),
    (lambda: nn.LayerNorm(16)(X.int()), TypeError, "input"),
    (lambda: nn.LayerNorm(16)(STRIDED), TypeError, "input"),
    (lambda: nn.RMSNorm((3, 16))(NESTED), ValueError, "normalized_shape"),
    (lambda: nn.RMSNorm(16, casting="hf"), ValueError, "casting"),
    (lambda: nn.RMSNorm(16, casting=None), ValueError, "casting"),
    (lambda: nn.GELU("fast")(X), ValueError, "approximate"),
    (lambda: nn.GELU()(None), TypeError, "input"),
    (lambda: nn.GELU()(STRIDED), TypeError, "input"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_input_is_refused_by_name(case):
    function, error, name = REFUSED[case]
    with pytest.raises(error, match=rf"^{name}: expected"):
        function()
