"""compat.flash_attn's fused norms, against the formula in float64."""

import itertools

import pytest
import torch

from fastattn.compat.flash_attn.ops import layer_norm as layer
from fastattn.compat.flash_attn.ops import rms_norm as rms
from fastattn.testing import assert_accurate, covering_sample, randn

HIDDEN, EPSILON = 48, 1e-5
MODULES = {"layer": layer, "rms": rms}


def named(kind, form=""):
    return getattr(MODULES[kind], f"dropout_add_{kind}_norm{form}")


def normed(kind, x, weight, bias, dtype):
    """The norm in float32 or wider, rounded to dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    n = wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
    return (n if bias is None else n + bias).to(dtype)


def summed(inputs, mask, dropout_p, dtype):
    """residual + layerscale * dropout(rowscale * x0), rounded to dtype."""
    x = inputs["x0"].to(torch.promote_types(inputs["x0"].dtype, torch.float32))
    if inputs.get("rowscale") is not None:
        x = x * inputs["rowscale"].unsqueeze(-1)
    x = x * mask / (1.0 - dropout_p)
    if inputs.get("layerscale") is not None:
        x = x * inputs["layerscale"]
    if inputs.get("residual") is not None:
        x = x + inputs["residual"]
    return x.to(dtype)


def gradients(outputs, inputs):
    """Of every input, for random gradients of the outputs."""
    douts = [
        randn(*y.shape, seed=70 + i, dtype=torch.bfloat16).to(y.dtype)
        for i, y in enumerate(outputs)
    ]
    leaves = [x for x in inputs.values() if x is not None]
    return torch.autograd.grad(outputs, leaves, douts)


def compare(call, formula, drawn, outputs):
    """Outputs and gradients of call keep the contract, against formula in float64.

    call(inputs) gives (outputs, mask); formula(inputs, mask, dtypes) gives outputs.
    """

    def results(dtype, function):
        inputs = {
            n: x if x is None else x.to(dtype or x.dtype).clone().requires_grad_()
            for n, x in drawn.items()
        }
        found = function(inputs)
        grads = gradients(found, inputs)
        names = [f"d{n}" for n, x in drawn.items() if x is not None]
        return dict(zip([*outputs, *names], [*found, *grads]))

    masks = []

    def called(inputs):
        found, mask = call(inputs)
        masks.append(mask)
        return found

    got = results(None, called)
    dtypes = [got[name].dtype for name in outputs]
    eager = results(None, lambda inputs: formula(inputs, masks[0], dtypes))
    wide = [torch.float64] * len(outputs)
    want = results(torch.float64, lambda inputs: formula(inputs, masks[0], wide))
    for name, x in got.items():
        if name != "drowscale":  # what norms leave of it is rounding: it has a test of its own
            assert_accurate(x, want[name], eager[name], name, dtype=drawn["x0"].dtype)


CASES = covering_sample(
    {
        "dtype": (torch.float32, torch.bfloat16),
        "weights": (torch.float32, None),
        "residual": (None, "same", torch.float32),
        "bias": (False, True),
        "rowscale": (False, True),
        "layerscale": (False, True),
        "dropout_p": (0.0, 0.3),
        "prenorm": (False, True),
        "residual_in_fp32": (False, True),
        "mask": (False, True),
        "leading": ((2, 5), (7,), (3, 2, 2)),
    },
    count=60,
    seed=1,
    fits=lambda case: case["mask"] or case["dropout_p"] == 0.0,  # the formula needs the mask
)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_dropout_add_norm(index, kind):
    case = CASES[index]
    dtype, leading = case["dtype"], case["leading"]
    of_weights = case["weights"] or dtype
    of_residual = dtype if case["residual"] == "same" else case["residual"]
    p = case["dropout_p"]
    drawn = {
        "x0": randn(*leading, HIDDEN, seed=1, dtype=dtype),
        "residual": of_residual and randn(*leading, HIDDEN, seed=2, dtype=of_residual),
        "weight": randn(HIDDEN, seed=3, dtype=of_weights),
        "bias": randn(HIDDEN, seed=4, dtype=of_weights)
        if case["bias"] or kind == "layer"
        else None,
        "rowscale": randn(*leading, seed=5, dtype=dtype) if case["rowscale"] else None,
        "layerscale": randn(HIDDEN, seed=6, dtype=of_weights) if case["layerscale"] else None,
    }
    x_dtype = of_residual or (torch.float32 if case["residual_in_fp32"] else dtype)

    def call(inputs):
        result = named(kind)(
            *(inputs[n] for n in ("x0", "residual", "weight", "bias")),
            *(p, EPSILON, inputs["rowscale"], inputs["layerscale"]),
            *(case["prenorm"], case["residual_in_fp32"], case["mask"]),
        )
        result = list(result) if isinstance(result, tuple) else [result]
        mask = torch.ones(*leading, HIDDEN)
        if case["mask"]:
            mask = result.pop()
            assert mask.dtype == torch.uint8 and mask.shape == drawn["x0"].shape
            assert p > 0 or mask.all()
        assert result[0].dtype == dtype
        assert len(result) == 1 + case["prenorm"]
        assert all(x.dtype == x_dtype for x in result[1:])
        return result, mask

    def formula(inputs, mask, dtypes):
        between = torch.float64 if dtypes[0] == torch.float64 else x_dtype
        x = summed(inputs, mask, p, between)
        z = normed(kind, x, inputs["weight"], inputs["bias"], dtypes[0])
        return [z, x] if case["prenorm"] else [z]

    compare(call, formula, drawn, ["z", "x"][: 1 + case["prenorm"]])


@pytest.mark.parametrize("kind", MODULES)
def test_the_gradient_of_the_scale_of_rows(kind):
    x0, residual = (randn(4, HIDDEN, seed=i, dtype=torch.float64) for i in range(2))
    weight, bias = (randn(HIDDEN, seed=i, dtype=torch.float64) for i in (2, 3))
    rowscale = randn(4, seed=4, dtype=torch.float64).requires_grad_()
    z = named(kind)(x0, residual, weight, bias, 0.0, EPSILON, rowscale)
    want = normed(kind, residual + x0 * rowscale.unsqueeze(1), weight, bias, torch.float64)
    torch.testing.assert_close(z, want)
    dout = randn(4, HIDDEN, seed=5, dtype=torch.float64)
    got, expected = (torch.autograd.grad(y, rowscale, dout)[0] for y in (z, want))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", MODULES)
def test_dropout_without_its_mask_drops_what_it_should(kind):
    """One pass of fastattn.functional: the sum tells what was dropped."""
    x0, residual = torch.ones(50, HIDDEN), torch.zeros(50, HIDDEN)
    weight, bias = torch.ones(HIDDEN), torch.zeros(HIDDEN) if kind == "layer" else None
    torch.manual_seed(0)
    z, x = named(kind)(x0, residual, weight, bias, 0.25, EPSILON, prenorm=True)
    kept = x != 0
    assert torch.equal(x, kept / 0.75)
    assert abs(kept.float().mean() - 0.75) < 0.03
    torch.testing.assert_close(z, normed(kind, x, weight, bias, torch.float32))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("weight1", [False, True])
@pytest.mark.parametrize("x1", [False, True])
@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dropout_p", "prenorm"), [(0.0, True), (0.2, True), (0.2, False)])
def test_parallel_residual(dropout_p, prenorm, residual, x1, weight1, kind):
    shape, dtype = (2, 5, HIDDEN), torch.bfloat16
    drawn = {
        "x0": randn(*shape, seed=1, dtype=dtype),
        "x1": randn(*shape, seed=2, dtype=dtype) if x1 else None,
        "residual": residual and randn(*shape, seed=3, dtype=residual),
        "weight0": randn(HIDDEN, seed=4),
        "bias0": randn(HIDDEN, seed=5),
        "weight1": randn(HIDDEN, seed=6) if weight1 else None,
        "bias1": randn(HIDDEN, seed=7) if weight1 else None,
    }
    outputs = ["z0", *(["z1"] if weight1 else []), *(["x"] if prenorm else [])]

    def call(inputs):
        found = named(kind, "_parallel_residual")(
            *inputs.values(),
            *(dropout_p, EPSILON),
            prenorm=prenorm,
            residual_in_fp32=True,
            return_dropout_mask=True,
        )
        *found, mask0, mask1 = found
        assert len(found) == 2 + prenorm and (found[1] is None) == (not weight1)
        assert dropout_p > 0 or (mask0.all() and mask1.all())
        assert x1 or mask1.all()
        return [x for x in found if x is not None], (mask0, mask1)

    def formula(inputs, masks, dtypes):
        x_dtype = torch.float64 if dtypes[0] == torch.float64 else residual or torch.float32
        terms = [summed({"x0": inputs["x0"]}, masks[0], dropout_p, x_dtype)]
        if x1:
            terms.append(summed({"x0": inputs["x1"]}, masks[1], dropout_p, x_dtype))
        x = sum(terms) if inputs["residual"] is None else inputs["residual"] + sum(terms)
        z = [
            normed(kind, x, inputs[f"weight{n}"], inputs[f"bias{n}"], dtypes[0])
            for n in range(1 + weight1)
        ]
        return [*z, x] if prenorm else z

    compare(call, formula, drawn, outputs)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("dropout_p", "layerscale"), [(0.0, True), (0.4, False)])
@pytest.mark.parametrize("prenorm", [False, True])
def test_subsets_of_rows(prenorm, dropout_p, layerscale, residual, kind):
    """Rows 1, 2, 4 of x take those of x0; rows 0, 1, 4 become those of z, and z has one more."""
    x0_subset = torch.tensor([[0, 1, 2], [0, 3, 0]], dtype=torch.int32)
    out_subset = torch.tensor([[1, 2, 0], [0, 3, 0]], dtype=torch.int32)
    drawn = {
        "x0": randn(3, HIDDEN, seed=1),
        "residual": randn(6, HIDDEN, seed=2) if residual else None,
        "weight": randn(HIDDEN, seed=3),
        "bias": randn(HIDDEN, seed=4),
        "layerscale": randn(HIDDEN, seed=5) if layerscale else None,
    }

    def call(inputs):
        *found, mask = named(kind, "_subset")(
            *(inputs[n] for n in ("x0", "residual", "weight", "bias")),
            *(dropout_p, EPSILON, inputs["layerscale"], x0_subset, out_subset, 1.5, 4),
            prenorm=prenorm,
            return_dropout_mask=True,
        )
        assert mask.shape == (3, HIDDEN)
        return found, mask

    def formula(inputs, mask, dtypes):
        scaled = {"x0": inputs["x0"] * 1.5, "layerscale": inputs["layerscale"]}
        branch = summed(scaled, mask, dropout_p, dtypes[0])
        zero = torch.zeros_like(branch[0])
        x = torch.stack([zero, branch[0], branch[1], zero, branch[2], zero])
        x = x if inputs["residual"] is None else x + inputs["residual"]
        z = normed(kind, x, inputs["weight"], inputs["bias"], dtypes[0])
        z = torch.stack([z[0], z[1], z[4], torch.zeros_like(z[0])])
        return [z, x] if prenorm else [z]

    compare(call, formula, drawn, ["z", "x"][: 1 + prenorm])


@pytest.mark.parametrize("bias", [False, True])
def test_the_norms_alone(bias):
    drawn = {
        "x0": randn(3, 5, HIDDEN, seed=1, dtype=torch.bfloat16),
        "weight": randn(HIDDEN, seed=2),
        "bias": randn(HIDDEN, seed=3) if bias else None,
    }

    def alone(kind):
        def call(inputs):
            given = inputs.values() if kind == "layer" else list(inputs.values())[:2]
            return [getattr(MODULES[kind], f"{kind}_norm")(*given, EPSILON)], None

        def formula(inputs, _, dtypes):
            return [normed(kind, inputs["x0"], inputs["weight"], inputs.get("bias"), dtypes[0])]

        return call, formula

    compare(*alone("layer"), drawn, ["z"])
    if not bias:
        compare(*alone("rms"), drawn, ["z"])


@pytest.mark.parametrize("name", ["DropoutAddLayerNorm", "DropoutAddRMSNorm"])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_modules(residual, prenorm, name):
    kind = "layer" if "Layer" in name else "rms"
    module = getattr(MODULES[kind], name)(HIDDEN, prenorm=prenorm, p=0.5, eps=EPSILON)
    expected = {"weight", "bias"} if kind == "layer" else {"weight"}
    assert set(module.state_dict()) == expected
    assert module.weight.eq(1).all()
    assert module.bias is None if kind == "rms" else not module.bias.any()
    x0 = randn(2, 5, HIDDEN, seed=1)
    given = (x0, randn(2, 5, HIDDEN, seed=2)) if residual else (x0,)
    x = x0 + given[1] if residual else x0
    want = normed(kind, x, module.weight, module.bias, torch.float32)
    found = module.eval()(*given)
    z = found[0] if prenorm else found
    torch.testing.assert_close(z, want)
    assert not prenorm or torch.equal(found[1], x)
    trained = module.train()(*given)
    assert not torch.equal(trained[0] if prenorm else trained, z)


def test_the_module_of_rms_norm():
    module = rms.RMSNorm(HIDDEN, eps=1e-3, dtype=torch.float64)
    x = randn(2, 5, HIDDEN, seed=1, dtype=torch.float64)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(module(x), want)
    assert set(module.state_dict()) == {"weight"} and module.bias is None
    assert rms.RMSNorm(HIDDEN).eps == 1e-5


X, W = torch.zeros(2, HIDDEN), torch.ones(HIDDEN)
SUBSET = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("dropout_p", lambda norm: norm("")(X, X, W, None, 1.0, EPSILON)),
        ("residual", lambda norm: norm("")(X, X[:1], W, None, 0.0, EPSILON)),
        ("residual", lambda norm: norm("")(X, X[:1].double(), W, None, 0.0, EPSILON)),
        ("normalized_shape", lambda norm: norm("")(X, None, W[:4], None, 0.0, EPSILON)),
        ("x0", lambda norm: norm("")(X[0, 0], X[0, 0], W, None, 0.0, EPSILON)),
        ("x0_subset", lambda norm: norm("_subset")(X, X, W, None, 0.0, EPSILON)),
        (
            "out_subset",
            lambda norm: norm("_subset")(X, X, W, None, 0.0, EPSILON, x0_subset=SUBSET),
        ),
        (
            "residual",
            lambda norm: norm("_parallel_residual")(X, X, X[:1], W, None, W, None, 0.0, EPSILON),
        ),
    ],
)
@pytest.mark.parametrize("kind", MODULES)
def test_errors_name_the_argument(kind, message, call):
    with pytest.raises(ValueError, match=f"^{message}: "):
        call(lambda form: named(kind, form))


def test_each_of_the_options_is_in_the_sample():
    for name in ("residual", "rowscale", "layerscale", "dropout_p", "prenorm"):
        values = {str(case[name]) for case in CASES}
        assert len(values) == (3 if name == "residual" else 2), name
    pairs = {(case["rowscale"], case["layerscale"]) for case in CASES}
    assert pairs == set(itertools.product([False, True], repeat=2))
