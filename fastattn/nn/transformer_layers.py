"""The encoder and the decoder layer of torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from fastattn.nn._linear import projected
from fastattn.nn._nested import is_nested, pack, rows
from fastattn.nn._residual import add_norm
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm

__all__ = ["TransformerDecoderLayer", "TransformerEncoderLayer"]

Activation = str | Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    r"""``torch.nn.TransformerEncoderLayer``: self-attention, then a feed-forward network.

    ::

        x = norm1(src + dropout1(self_attn(src)))                         post-norm, the default
        y = norm2(x + dropout2(linear2(dropout(activation(linear1(x))))))

        x = src + dropout1(self_attn(norm1(src)))                         pre-norm: norm_first=True
        y = x + dropout2(linear2(dropout(activation(linear1(norm2(x))))))

    Constructor, initial values for a given seed, state_dict and masks are those of torch.
    Attention never builds the matrix of weights; dropout, residual and norm are one pass over
    memory, bias and activation another. A submodule that is replaced, or has hooks, is called as
    it is; and a subclass that overrides ``_sa_block`` or ``_ff_block`` has its blocks called.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
        norm_first, bias, device, dtype: as in torch.

    Shape:
        src: (length, batch, d_model), (batch, length, d_model) with batch_first, or
        (length, d_model); or a jagged nested tensor (batch, ragged length, d_model), of which no
        padding is ever made. The output has the shape of src.

    Differences from torch: there is one path, in training and in evaluation, so that the output
    never loses padded rows or rounds otherwise; a query that sees no key gets 0 from attention,
    never NaN; is_causal needs no mask beside it.

    >>> layer = TransformerEncoderLayer(d_model=32, nhead=4, batch_first=True)
    >>> layer(torch.randn(2, 10, 32), is_causal=True).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _use_our_modules(self)

    @property
    def activation_relu_or_gelu(self) -> int:
        # With another number torch's containers take the layer apart: they read its weights and
        # run a kernel of their own instead of calling it. What torch's constructor finds is kept
        # for fastattn.revert.
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, number: int) -> None:
        vars(self)["activation_relu_or_gelu"] = number

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output for src.

        Args:
            src: the sequences, see Shape.
            src_mask: boolean (True: may not attend) or float (added to the scores, with a
                gradient), (length, length) or (batch * nhead, length, length).
            src_key_padding_mask: boolean (True: no token attends to this one) or float,
                (batch, length), or (length) for a src without batch.
            is_causal: no token attends to a later one. A src_mask that is given as well is taken
                to say the same, and is not read.

        Raises:
            ValueError, TypeError: name the argument. A nested src takes no mask.
        """
        if _has_own_blocks(self, nn.TransformerEncoderLayer):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        _require_tensor("src", src)
        if src.is_nested and src.layout == torch.strided:
            return self._forward_strided(src, src_mask, src_key_padding_mask, is_causal)
        _require_width("src", src, self.self_attn)
        x, like = _open("src", src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)

        def attend(x: Tensor) -> Tensor:
            return _attend(
                *(self.self_attn, x, None, like),
                *(src_mask, src_key_padding_mask, is_causal),
                names={"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"},
            )

        if self.norm_first:
            x, residual = add_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            x = residual + self.dropout2(_feed_forward(self, x))
        else:
            x, _ = add_norm(attend(x), x, self.dropout1, self.norm1)
            x, _ = add_norm(_feed_forward(self, x), x, self.dropout2, self.norm2)
        return x if like is None else pack(x, like)

    def _forward_strided(self, src: Tensor, *options: Any) -> Tensor:
        """For nested tensors of the older layout: torch.nn.TransformerEncoder makes them of padded
        input in evaluation, where this layer was put into one."""
        jagged = torch.nested.as_nested_tensor(list(src.unbind()), layout=torch.jagged)
        out = TransformerEncoderLayer.forward(self, jagged, *options)
        return torch.nested.as_nested_tensor(list(out.unbind()), layout=torch.strided)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    r"""``torch.nn.TransformerDecoderLayer``: self-attention, attention to a memory, feed-forward.

    ::

        x = norm1(tgt + dropout1(self_attn(tgt)))                         post-norm, the default
        y = norm2(x + dropout2(multihead_attn(x, memory)))
        z = norm3(y + dropout3(linear2(dropout(activation(linear1(y))))))

    and with norm_first=True each norm is taken of what enters its sublayer. All else is as for
    :class:`TransformerEncoderLayer`; the block of attention to the memory is ``_mha_block``.

    One more difference from torch: a copy keeps an activation that is a module. (torch's layer has
    ReLU in its place when it is copied, which torch.nn.TransformerDecoder does.)

    Shape:
        tgt: as src there. memory: likewise, with a length of its own; nested where tgt is.

    >>> layer = TransformerDecoderLayer(d_model=32, nhead=4, batch_first=True)
    >>> layer(torch.randn(2, 10, 32), torch.randn(2, 7, 32), tgt_is_causal=True).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _use_our_modules(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's puts ReLU in place of an activation that is a module.
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer's output for tgt.

        Args:
            tgt, memory: the sequences, see Shape.
            tgt_mask, tgt_key_padding_mask, tgt_is_causal: of the self-attention, as those of
                :meth:`TransformerEncoderLayer.forward`.
            memory_mask: the same for attention to the memory, (length, memory length) or
                (batch * nhead, length, memory length).
            memory_key_padding_mask: (batch, memory length) or (memory length).
            memory_is_causal: token i attends to no row of memory after the i-th.

        Raises:
            ValueError, TypeError: name the argument. Nested tensors take no mask.
        """
        if _has_own_blocks(self, nn.TransformerDecoderLayer):
            return super().forward(
                *(tgt, memory, tgt_mask, memory_mask),
                *(tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal),
            )
        _require_tensor("tgt", tgt)
        _require_width("tgt", tgt, self.self_attn)
        x, like = _open(
            *("tgt", tgt),
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )

        def attend(x: Tensor) -> Tensor:
            return _attend(
                *(self.self_attn, x, None, like),
                *(tgt_mask, tgt_key_padding_mask, tgt_is_causal),
                names={"attn_mask": "tgt_mask", "key_padding_mask": "tgt_key_padding_mask"},
            )

        def attend_to_memory(x: Tensor) -> Tensor:
            return _attend(
                *(self.multihead_attn, x, memory, like),
                *(memory_mask, memory_key_padding_mask, memory_is_causal),
                names={
                    "query": "tgt",
                    "key": "memory",
                    "value": "memory",
                    "attn_mask": "memory_mask",
                    "key_padding_mask": "memory_key_padding_mask",
                },
            )

        if self.norm_first:
            x, residual = add_norm(attend(self.norm1(x)), x, self.dropout1, self.norm2)
            x, residual = add_norm(attend_to_memory(x), residual, self.dropout2, self.norm3)
            x = residual + self.dropout3(_feed_forward(self, x))
        else:
            x, _ = add_norm(attend(x), x, self.dropout1, self.norm1)
            x, _ = add_norm(attend_to_memory(x), x, self.dropout2, self.norm2)
            x, _ = add_norm(_feed_forward(self, x), x, self.dropout3, self.norm3)
        return x if like is None else pack(x, like)


def _use_our_modules(layer: nn.Module) -> None:
    """Ours in place of torch's attention and norms.

    Only their class changes: what torch's constructor drew stays, so that a seed gives the values
    that it gives there.
    """
    for module in layer.children():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
        elif type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm


def _has_own_blocks(layer: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass, or the instance, redefines a block of torch's layer ``base``.

    Such a block takes part in torch's own sequence of steps only, which then runs over our
    submodules.
    """
    return any(
        name in vars(layer) or getattr(type(layer), name) is not getattr(base, name)
        for name in ("_sa_block", "_mha_block", "_ff_block")
        if hasattr(base, name)
    )


def _require_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _require_width(name: str, x: Tensor, attention: nn.Module) -> None:
    width = getattr(attention, "embed_dim", x.shape[-1])
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        raise ValueError(
            f"{name}: expected 2 or 3 dimensions, the last of them {width}, got {tuple(x.shape)}"
        )


def _open(name: str, x: Tensor, **masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows to work on, and for a nested x (which takes no mask) the tensor that bounds them."""
    if not is_nested(name, x):
        return x, None
    for mask_name, mask in masks.items():
        if mask is not None:
            raise ValueError(
                f"{mask_name}: expected None with a nested {name}, whose sequences have lengths "
                f"of their own (is_causal serves them), got shape {tuple(mask.shape)}"
            )
    values, _ = rows(x)
    return values, x


def _attend(
    attention: nn.Module,
    x: Tensor,
    memory: Tensor | None,
    like: Tensor | None,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    names: Mapping[str, str],
) -> Tensor:
    """Rows of attention of x to itself or to the memory; ``like`` bounds them where nested.

    names: what the layer calls the arguments of attention, for its errors.
    """
    query = x if like is None else pack(x, like)
    memory = query if memory is None else memory
    try:
        out: Tensor = attention(
            query,
            memory,
            memory,
            attn_mask=mask,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            is_causal=is_causal,
        )[0]
    except (TypeError, ValueError) as error:
        argument, _, rest = str(error).partition(":")
        if argument in names:
            raise type(error)(f"{names[argument]}:{rest}") from None
        raise
    return out if like is None else rows(out)[0]


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    hidden = projected(layer.linear1, x, layer.activation)
    out: Tensor = layer.linear2(layer.dropout(hidden))
    return out
