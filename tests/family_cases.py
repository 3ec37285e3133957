"""Model families on fastattn, most of them of transformers, against their own eager code: what is
compared, and the page of them (docs/families.md is what ``python tests/family_cases.py`` prints).

The families are in family_<kind>.py, small and with random weights.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MODULES = (
    "family_encoders",
    "family_decoders",
    "family_encoder_decoders",
    "family_vision",
    "family_multimodal",
    "family_audio",
    "family_text_adapters",
    "family_media_adapters",
    "family_nn",
)
ROWS, LENGTH, VOCABULARY = 3, 12, 99


@dataclass(frozen=True)
class Family:
    """One family, and what its model is called with.

    build: the model, with eager attention, in float32 and evaluation; every parameter is random.
    inputs: keyword arguments of its forward, by padding: "none"; and, where the family takes them,
    "right" and "left" (attention_mask), "packed" (position_ids that begin anew).
    """

    name: str
    kind: str  # as in the page: "encoder", "vision + text" ...
    way: str  # "hook", "adapter" or "nn"
    build: Callable[[], Any]
    inputs: Callable[[str], dict[str, Any]]
    paddings: Sequence[str] = ("none", "right", "left")
    caches: Sequence[str] = ()  # "dynamic", "static": those that it generates with
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    note: str = ""  # why a padding, a cache or a dtype is not there


def families() -> list[Family]:
    """By kind, in the order in which the kinds are met."""
    found = [f for module in MODULES for f in importlib.import_module(module).FAMILIES]
    kinds = list(dict.fromkeys(family.kind for family in found))
    return sorted(found, key=lambda family: kinds.index(family.kind))


def padding_mask(padding: str, rows: int = ROWS, length: int = LENGTH) -> Tensor | None:
    """(rows, length), 1 for what counts: the first row is whole, the others lose 3, 6, ..."""
    if padding not in ("right", "left"):
        return None
    kept = (length - 3 * torch.arange(rows)).clamp(min=1)[:, None]
    columns = torch.arange(length)
    visible = columns < kept if padding == "right" else columns >= length - kept
    return visible.long()


def text(padding: str, rows: int = ROWS, length: int = LENGTH) -> dict[str, Any]:
    """Inputs of a model of text."""
    generator = torch.Generator().manual_seed(1)
    rows = 1 if padding == "packed" else rows
    # From 3 on: small numbers are tokens with a meaning, padding among them.
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids}
    if padding == "packed":
        parts = [torch.arange(n) for n in (5, 1, length - 6)]
        inputs |= {"position_ids": torch.cat(parts)[None], "use_cache": False}
    mask = padding_mask(padding, rows, length)
    return inputs if mask is None else inputs | {"attention_mask": mask}


def drawn(*shape: int) -> Tensor:
    """Normal numbers that every dtype holds exactly: pixels, sound."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).bfloat16().float()


def randomise(model: Any, seed: int = 0) -> Any:
    """Every parameter random and the same in every process, those that are initialised to a
    constant near to it; in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            equal = parameter.dim() == 1 < len(parameter) and (parameter == parameter[0]).all()
            constant = parameter.dim() == 0 or equal
            parameter.copy_(parameter + 0.1 * noise if constant else 0.2 * noise)
    return model.eval()


class InDouble(TorchFunctionMode):
    """What asks for float32 gets float64: models compute softmax, norms and rotary tables in
    float32 whatever their weights are in, and an oracle must not."""

    def __torch_function__(self, function, types, given=(), named=None):
        named = {n: torch.float64 if x is torch.float32 else x for n, x in (named or {}).items()}
        given = tuple(torch.float64 if x is torch.float32 else x for x in given)
        return (torch.Tensor.double if function is torch.Tensor.float else function)(
            *given, **named
        )


def oracle_results(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """results of the eager model in float64."""
    with InDouble():
        return results(model.double(), inputs)


def of_transformers(name: str, model: str, config: dict[str, Any], seed: int = 0) -> Any:
    """<name><model> with <name>Config, with random weights and eager attention in every part."""
    transformers = importlib.import_module("transformers")
    made = getattr(transformers, f"{name}Config")(**config)
    made._attn_implementation = "eager"
    return randomise(getattr(transformers, f"{name}{model}")(made), seed)


def results(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating output, where padding does not make it arbitrary, and the gradient of every
    parameter from all of them."""
    dtype = next(model.parameters()).dtype
    given = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    model.zero_grad()
    outputs = dict(_floating("", model(**given).to_tuple()))
    masks = [
        inputs[name] for name in ("attention_mask", "decoder_attention_mask") if name in inputs
    ]
    for name, x in outputs.items():
        for mask in masks:
            if x.shape[:2] == mask.shape:
                outputs[name] = x[mask.bool()]
    loss = torch.zeros(())
    for i, x in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(i)
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x * weights.to(x.dtype)).sum()
    loss.backward()
    gradients = {
        f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    return {name: x.detach() for name, x in outputs.items()} | gradients


def _floating(name: str, x: Any) -> list[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        return [(name, x)] if x.is_floating_point() and x.requires_grad else []
    if isinstance(x, (tuple, list)):
        return [pair for i, part in enumerate(x) for pair in _floating(f"{name}[{i}]", part)]
    return []


def assert_as_eager(
    actual: dict[str, Tensor], oracle: dict[str, Tensor], eager: dict[str, Tensor], dtype: Any
) -> None:
    """At most twice as far from the oracle as eager, but for eight units in the last place: the
    outputs together, the gradients together (root of the mean square over tensors), and each tensor
    against eager's worst. How far a single tensor of a deep chain is off is luck in either.

    How far: relative to the tensor's largest number, or to a tenth of the largest of all where that
    is more, since sums cancel: the exact gradient of a key's bias is 0, and its terms are not.
    """
    assert actual.keys() == oracle.keys() == eager.keys()
    eps = torch.finfo(dtype).eps
    for kind in ("outputs", "gradients"):
        names = [name for name in oracle if (name[:2] == "d ") == (kind == "gradients")]
        largest = torch.stack([oracle[name].abs().max() for name in names])
        scale = largest.clamp(min=0.1 * largest.max())

        def errors(given: dict[str, Tensor], names=names, scale=scale) -> Tensor:
            off = [(given[name].double() - oracle[name]).abs().max() for name in names]
            return torch.stack(off) / scale

        got, allowed = errors(actual), errors(eager)
        assert not got.isnan().any(), [n for n, x in zip(names, got, strict=True) if x.isnan()]
        worst = names[int(got.argmax())]
        assert got.max() <= 2 * allowed.max() + 8 * eps, f"{worst}: {got.max()}, {allowed.max()}"
        together = [x.square().mean().sqrt() for x in (got, allowed)]
        assert together[0] <= 2 * together[1] + 8 * eps, f"{kind}: {together}"


def page() -> str:
    """docs/families.md."""
    lines = [
        "# Model families",
        "",
        "Each of these families runs on fastattn. tests/test_families.py holds it, small and with",
        "random weights, against its own eager code in float64: outputs and the gradients of all",
        "parameters, without padding, with padding on either side, with packed sequences, in",
        "float32 and bfloat16; and the tokens of greedy generation, which must be the same.",
        "",
        '*hook*: the name is enough, `attn_implementation="fastattn"`, after',
        "`fastattn.integrations.huggingface.register()`. *adapter*: `patch(model)` puts a module",
        "of ours in place of its attention. `patch` does both. *nn*: built from `fastattn.nn` and",
        "`fastattn.functional`, and compared with torch.nn or the formula.",
        "",
        "| kind | family | way | padding, packing | generation | notes |",
        "|---|---|---|---|---|---|",
    ]
    for family in families():
        paddings = ", ".join(p for p in family.paddings if p != "none") or "-"
        caches = ", ".join(f"{cache} cache" for cache in family.caches) or "-"
        words = (family.kind, family.name, family.way, paddings, caches, family.note)
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
