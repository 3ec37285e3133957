"""What the tests of the transformer classes share: small models, sampled cases and their check."""

import copy
import math
from functools import partial

import torch
from torch import nn

import fastattn.nn as fnn
from fastattn.testing import assert_accurate, covering_sample, one_thread, randn

WIDTH, BATCH = 24, 2

# For us and for torch, whose decoder layer loses a module when it is copied.
ACTIVATIONS = {
    "relu": ("relu", "relu"),
    "gelu": ("gelu", "gelu"),
    "function": (nn.functional.gelu, nn.functional.gelu),
    "module": (nn.GELU("tanh"), partial(nn.functional.gelu, approximate="tanh")),
    "other function": (torch.tanh, torch.tanh),
    "other module": (nn.Softplus(), nn.functional.softplus),
}

# What every class has.
COMMON = {
    "nhead": (1, 2, 3, 4),
    "dim_feedforward": (8, 16, 19),
    "activation": tuple(ACTIVATIONS),
    "layer_norm_eps": (1e-5, 1e-2),
    "batch_first": (False, True),
    "norm_first": (False, True),
    "bias": (False, True),
    "dtype": (torch.float32, torch.bfloat16, torch.float64),
    "layout": ("batched", "batched", "unbatched"),
    "length": (1, 2, 5, 9),
    "training": (False, True),
}
# How queries see keys: by a mask of one kind, by a flag, or both; and which keys are padding.
MASKS = ("none", "boolean", "float", "boolean per head", "float per head")
CAUSAL = ("none", "flag", "flag and mask", "mask")
PADDING = ("none", "none", "boolean", "float")

SELF = {"mask": MASKS, "causal": CAUSAL, "padding": PADDING}
MEMORY = {
    "memory_length": (1, 4, 7),
    "memory_mask": MASKS,
    "memory_causal": (False, True),
    "memory_padding": PADDING,
}
ENCODER = {f"src_{name}": values for name, values in SELF.items()}
DECODER = {f"tgt_{name}": values for name, values in SELF.items()} | MEMORY
STACK = {"layers": (1, 2), "norm": (False, True)}
AXES = {
    "TransformerEncoderLayer": COMMON | ENCODER,
    "TransformerDecoderLayer": COMMON | DECODER,
    "TransformerEncoder": COMMON | ENCODER | STACK,
    "TransformerDecoder": COMMON | DECODER | STACK,
    "Transformer": COMMON | ENCODER | DECODER | {"layers": (1,)},
}


def fits(case):
    for side in ("src", "tgt"):
        if case.get(f"{side}_causal", "none") != "none" and case[f"{side}_mask"] != "none":
            return False
    return not (case.get("memory_causal") and case["memory_mask"] != "none")


def sample(name, count, seed=0):
    return covering_sample(AXES[name], count, seed, fits)


def build(package, name, case):
    """The class ``name`` of torch.nn or fastattn.nn, without dropout."""
    names = ("nhead", "dim_feedforward", "layer_norm_eps", "batch_first", "norm_first", "bias")
    options = {n: case[n] for n in names} | {"dropout": 0.0, "dtype": case["dtype"]}
    options["activation"] = ACTIVATIONS[case["activation"]][package is nn]
    if name == "Transformer":
        layers = {f"num_{part}_layers": case["layers"] for part in ("encoder", "decoder")}
        return getattr(package, name)(WIDTH, **layers, **options)
    if name.endswith("Layer"):
        return getattr(package, name)(WIDTH, **options)
    layer = getattr(package, f"{name}Layer")(WIDTH, **options)
    norm = package.LayerNorm(WIDTH, dtype=case["dtype"]) if case["norm"] else None
    more = {"enable_nested_tensor": False} if name == "TransformerEncoder" else {}
    return getattr(package, name)(layer, case["layers"], norm, **more)


def perturbed(state, dtype):
    """Values for every parameter: biases and norms start as zeros and ones, which hide errors."""
    return {
        name: (x.double() + 0.1 * randn(*x.shape, seed=i, dtype=torch.float64)).to(dtype)
        for i, (name, x) in enumerate(state.items())
    }


def inputs(name, case):
    """(tensors, our options, torch's options), each by name."""
    drawn = {}
    mine, theirs = {}, {}
    encodes, decodes = "src_mask" in case, "tgt_mask" in case
    length, dtype = case["length"], case["dtype"]
    memory_length = case.get("memory_length", length)
    if encodes:
        drawn["src"] = sequence(case, memory_length if decodes else length, seed=1)
        mask_name = "mask" if name == "TransformerEncoder" else "src_mask"
        flag = "src_is_causal" if name == "Transformer" else "is_causal"
        keys = memory_length if decodes else length
        names = (mask_name, "src_key_padding_mask", flag)
        attention(case, "src", keys, keys, names, drawn, mine, theirs, seed=10)
    if decodes:
        drawn["tgt"] = sequence(case, length, seed=2)
        if not encodes:
            drawn["memory"] = sequence(case, memory_length, seed=3)
        names = ("tgt_mask", "tgt_key_padding_mask", "tgt_is_causal")
        attention(case, "tgt", length, length, names, drawn, mine, theirs, seed=20)
        names = ("memory_mask", "memory_key_padding_mask", "memory_is_causal")
        attention(case, "memory", length, memory_length, names, drawn, mine, theirs, seed=30)
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in drawn.items()}, mine, theirs


def sequence(case, length, seed):
    shape = (BATCH, length, WIDTH) if case["batch_first"] else (length, BATCH, WIDTH)
    return randn(*((length, WIDTH) if case["layout"] == "unbatched" else shape), seed=seed)


def attention(case, side, queries, keys, names, drawn, mine, theirs, seed):
    """Masks and flags of one attention; torch is told a flag by the mask that says the same."""
    mask_name, padding_name, flag = names
    batch = () if case["layout"] == "unbatched" else (BATCH,)
    kind, causal = case[f"{side}_mask"], case[f"{side}_causal"]
    if kind != "none":
        per_head = (math.prod(batch) * case["nhead"],) if "per head" in kind else ()
        drawn[mask_name] = mask((*per_head, queries, keys), kind, seed)
    elif causal not in ("none", False):
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        theirs[mask_name] = hidden
        if causal in ("mask", "flag and mask"):
            mine[mask_name] = hidden
        if causal != "mask":
            mine[flag] = True
    if case[f"{side}_padding"] != "none":
        drawn[padding_name] = mask((*batch, keys), case[f"{side}_padding"], seed + 1)


def mask(shape, kind, seed):
    """Hides some keys, never the first."""
    hidden = randn(*shape, seed=seed) > 0.5
    hidden[..., 0] = False
    if kind.startswith("boolean"):
        return hidden
    return randn(*shape, seed=seed + 100).masked_fill(hidden, -math.inf)


def results(module, tensors, options):
    """The output, and the gradients of all inputs, float masks and parameters."""
    leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
    out = module(**leaves, **options)
    wanted = {n: x for n, x in leaves.items() if x.requires_grad} | dict(module.named_parameters())
    dout = randn(*out.shape, seed=77, dtype=torch.bfloat16).to(out.dtype)
    grads = torch.autograd.grad(out, list(wanted.values()), dout)
    for x, grad in zip((out, *wanted.values()), (dout, *grads), strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype == module_dtype(module)
    gradients = torch.cat([grad.flatten() for grad in grads])
    return {"out": out.detach().flatten(), "gradients": gradients}


def module_dtype(module):
    return next(module.parameters()).dtype


def check(name, cases):
    """Ours against torch's class in float64, with and without gradients.

    The accuracy contract holds over all cases of a dtype: of one alone, the error that rounding
    leaves in torch's result is a matter of luck. Each case gives two vectors, the output and all
    gradients, divided by their largest element. (Where rounding moves a number over the kink of
    ReLU, gradients differ wholly: they are not compared in bfloat16.)
    """
    found = {}
    for case in cases:
        got, want, plain = compared(name, case)
        wide = torch.promote_types(case["dtype"], torch.float32)
        for part, x in got.items():
            if part == "gradients" and case["activation"] == "relu" and wide != case["dtype"]:
                continue
            vectors = [y.to(wide) / want[part].abs().max() for y in (x, want[part], plain[part])]
            found.setdefault((case["dtype"], part), []).append((case, *vectors))
    for what, results in found.items():
        worst = max(results, key=lambda result: (result[1] - result[2]).abs().max())[0]
        vectors = (torch.cat(x) for x in list(zip(*results, strict=True))[1:])
        assert_accurate(*vectors, f"{name}, {what}, worst in {worst}:", dtype=what[0])


def compared(name, case):
    """The results of ours, of torch's class in float64, and of torch's class."""
    torch.manual_seed(0)
    theirs, ours = build(nn, name, case), build(fnn, name, case)
    theirs.load_state_dict(perturbed(theirs.state_dict(), case["dtype"]))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tensors, my_options, their_options = inputs(name, case)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    with one_thread():
        plain = results(theirs, tensors, their_options)
        want = results(copy.deepcopy(theirs).double(), exact, their_options)
    ours.train(case["training"])
    got = results(ours, tensors, my_options)
    with torch.no_grad():
        got["inference"] = ours(**tensors, **my_options).flatten()
    for x in (want, plain):
        x["inference"] = x["out"]
    return got, want, plain


NAMES = tuple(AXES)
LENGTHS = (3, 7, 1, 4)
FLAG = {
    name: "is_causal" if name.startswith("TransformerEncoder") else "tgt_is_causal" for name in AXES
}


def layer(cls=fnn.TransformerEncoderLayer, **options):
    """A small layer without dropout, of the same values for every class."""
    torch.manual_seed(1)
    return cls(16, 4, **{"dim_feedforward": 24, "dropout": 0.0, "batch_first": True} | options)


def model(name, package=fnn, **options):
    """One of the five classes."""
    if name == "Transformer":
        options = {"num_encoder_layers": 2, "num_decoder_layers": 2} | options
    if name == "Transformer" or name.endswith("Layer"):
        return layer(getattr(package, name), **options)
    return getattr(package, name)(layer(getattr(package, f"{name}Layer"), **options), 2)


def sequences(name, lengths=LENGTHS):
    """What forward takes, each as a list of sequences: those of the second are longer."""
    count = 1 if "Encoder" in name else 2
    return [
        [randn(n + 2 * i, 16, seed=10 * i + j) for j, n in enumerate(lengths)] for i in range(count)
    ]


def batched(name, length=5):
    return [torch.stack(rows) for rows in sequences(name, (length, length))]


def nested(rows):
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


class Spy(fnn.TransformerEncoderLayer):
    """Keeps what its container passes."""

    def forward(self, src, **options):
        self.given = options
        return super().forward(src, **options)
