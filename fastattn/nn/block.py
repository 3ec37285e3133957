"""One layer of a transformer: sublayers, norms and residual additions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastattn.nn._attention_call import Cache
from fastattn.nn._nested import is_nested, pack, rows
from fastattn.nn._residual import add_norm
from fastattn.nn.norm import RMSNorm

__all__ = ["TransformerBlock"]

_PLACEMENTS = ("pre", "post", "parallel", "sandwich", "inner")

# The options of the attention that cross-attention has as well.
_SHARED = ("cu_seqlens", "max_seqlen", "layer")


class _Step(NamedTuple):
    """A sublayer with the norms before and behind it."""

    sublayer: Callable[[Tensor], Tensor]
    norm: nn.Module | None
    out_norm: nn.Module | None


class TransformerBlock(nn.Module):
    r"""A layer of any transformer: sublayers f, a norm for each, residual additions.

    ::

        "pre"           x = x + f(norm(x))                          GPT-2, Llama, ViT
        "post"          x = norm(x + f(x))                          the original Transformer, BERT
        "sandwich"      x = x + out_norm(f(norm(x)))                Gemma 2, Gemma 3
        "inner"         x = x + out_norm(f(x))                      OLMo 2, Swin v2
        "parallel"      n = norm(x); x = x + attention(n) + feed_forward(n)     GPT-J, PaLM, Cohere

    for each sublayer in turn: attention, cross_attention where there is one, feed_forward. A
    residual addition, its dropout and the norm behind it are one pass over memory where the norm is
    LayerNorm or RMSNorm of fastattn.nn.

    Args:
        attention: an :class:`Attention`, or a module with an ``embed_dim`` that is called alike.
        feed_forward: a :class:`FeedForward`, a :class:`GatedFeedForward`, or a module of x.
        cross_attention: as attention, called with the context; not with "parallel".
        norm: makes a norm of embed_dim; by default RMSNorm with eps 1e-6, where attention lies. For
            others: ``norm=fastattn.nn.LayerNorm``, ``norm=partial(RMSNorm, casting="gemma")``.
        placement: as above.
        dropout: of each sublayer's result, in training.

    Source: Xiong et al., On Layer Normalization in the Transformer Architecture (2020), "pre" and
    "post"; Ding et al., CogView (2021), "sandwich"; Wang and Komatsuzaki, GPT-J-6B (2021),
    "parallel".

    >>> from fastattn.nn import Attention, GatedFeedForward
    >>> block = TransformerBlock(Attention(32, 4, causal=True), GatedFeedForward(32, 64))
    >>> block(torch.randn(2, 6, 32)).shape
    torch.Size([2, 6, 32])
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        *,
        cross_attention: nn.Module | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        placement: str = "pre",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if placement not in _PLACEMENTS:
            known = ", ".join(map(repr, _PLACEMENTS))
            raise ValueError(f"placement: expected one of {known}, got {placement!r}")
        if placement == "parallel" and cross_attention is not None:
            raise ValueError("cross_attention: expected None with placement 'parallel'")
        self.placement = placement
        self.dropout = nn.Dropout(dropout)
        self.attention = attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward

        make = _default_norm(attention) if norm is None else norm
        size: Any = attention.embed_dim
        crossing = cross_attention is not None
        before, behind = placement != "inner", placement in ("sandwich", "inner")
        self.attention_norm = make(size) if before else None
        self.cross_attention_norm = make(size) if before and crossing else None
        self.feed_forward_norm = make(size) if before and placement != "parallel" else None
        self.attention_out_norm = make(size) if behind else None
        self.cross_attention_out_norm = make(size) if behind and crossing else None
        self.feed_forward_out_norm = make(size) if behind else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        context_lengths: Tensor | None = None,
        context_cu_seqlens: Tensor | None = None,
        cross_cache: Cache | None = None,
        **attention_options: Any,
    ) -> Tensor:
        """
        Args:
            x: as :class:`Attention` takes it: dense, packed or nested.
            context: for the cross-attention; not needed where cross_cache holds it.
            context_mask: its mask; boolean, True = attend.
            context_lengths: (batch), its valid rows.
            context_cu_seqlens: its bounds, beside cu_seqlens.
            cross_cache: keys and values of the context, written where context is given.
            attention_options: mask, bias, key_lengths, positions, cu_seqlens, max_seqlen, cache and
                layer of the self-attention (the cross-attention has the same cu_seqlens,
                max_seqlen and layer).
        """
        if is_nested("x", x):
            dense_only = {
                "context_mask": context_mask,
                "context_lengths": context_lengths,
                "context_cu_seqlens": context_cu_seqlens,
                "cross_cache": cross_cache,
            }
            return self._of_nested(x, context, attention_options | dense_only)
        if context is not None and self.cross_attention is None:
            raise ValueError("context: expected None without cross_attention, got a tensor")
        shared = {n: attention_options[n] for n in _SHARED if n in attention_options}
        cross_options = shared | {
            "mask": context_mask,
            "key_lengths": context_lengths,
            "context_cu_seqlens": context_cu_seqlens,
            "cache": cross_cache,
        }
        steps = [
            _Step(
                lambda x: self.attention(x, **attention_options),
                self.attention_norm,
                self.attention_out_norm,
            ),
            _Step(
                lambda x: self._cross(x, context, cross_options),
                self.cross_attention_norm,
                self.cross_attention_out_norm,
            ),
            _Step(self.feed_forward, self.feed_forward_norm, self.feed_forward_out_norm),
        ]
        if self.cross_attention is None:
            del steps[1]
        if self.placement == "parallel":
            return self._parallel(x, steps)
        if self.placement == "post":
            for step in steps:
                x, _ = add_norm(step.sublayer(x), x, self.dropout, step.norm)
            return x
        return self._pre(x, steps)

    def _pre(self, x: Tensor, steps: list[_Step]) -> Tensor:
        first = steps[0].norm
        normalised = x if first is None else first(x)
        next_norms = [step.norm for step in steps[1:]] + [None]
        for step, norm in zip(steps, next_norms, strict=True):
            out = step.sublayer(normalised)
            if step.out_norm is not None:
                out = step.out_norm(out)
            normalised, x = add_norm(out, x, self.dropout, norm)
        return x

    def _parallel(self, x: Tensor, steps: list[_Step]) -> Tensor:
        assert self.attention_norm is not None
        normalised = self.attention_norm(x)
        for step in steps:
            x = x + self.dropout(step.sublayer(normalised))
        return x

    def _cross(self, x: Tensor, context: Tensor | None, options: dict[str, Any]) -> Tensor:
        assert self.cross_attention is not None
        if context is None and options["cache"] is None:
            raise ValueError("context: expected a tensor, or a cross_cache that holds it, got None")
        out: Tensor = self.cross_attention(x, context, **options)
        return out

    def _of_nested(self, x: Tensor, context: Tensor | None, options: dict[str, Any]) -> Tensor:
        """On packed rows, so that nothing is ever padded."""
        for name, value in options.items():
            if value is not None and name not in ("positions", "max_seqlen", "layer"):
                raise ValueError(f"{name}: expected None with nested sequences, got another")
        packed, bounds = rows(x)
        options = options | {"cu_seqlens": bounds}
        if context is not None:
            if not is_nested("context", context):
                raise ValueError("context: expected nested sequences, as x is, got a dense tensor")
            context, options["context_cu_seqlens"] = rows(context)
        return pack(self(packed, context, **options), like=x)

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}"


def _default_norm(attention: nn.Module) -> Callable[[int], nn.Module]:
    weight = next(attention.parameters())
    return lambda size: RMSNorm(size, eps=1e-6, device=weight.device, dtype=weight.dtype)
