"""The stacks of encoder and decoder layers of torch.nn, and both together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from fastattn._ops.common import is_transformed
from fastattn.nn._nested import is_nested
from fastattn.nn.norm import LayerNorm
from fastattn.nn.transformer_layers import (
    Activation,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

__all__ = ["Transformer", "TransformerDecoder", "TransformerEncoder"]


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``: num_layers copies of a layer, and a norm behind them.

    Args:
        encoder_layer: the layer to copy, ours or any that is called as torch's are. As in torch,
            all copies start with its values.
        num_layers: how many.
        norm: a module for the output of the last layer, or None.
        enable_nested_tensor, mask_check: accepted and kept. In torch they let evaluation convert
            padded input to nested tensors, which zeroes or cuts the padded rows of the output;
            here nothing is ever converted or cut. Pass a jagged nested tensor to save the work.

    >>> encoder = TransformerEncoder(TransformerEncoderLayer(32, 4, batch_first=True), 2)
    >>> lengths = [torch.randn(length, 32) for length in (5, 9)]
    >>> nested = torch.nested.nested_tensor(lengths, layout=torch.jagged)
    >>> [tuple(x.shape) for x in encoder(nested).unbind()]
    [(5, 32), (9, 32)]
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        layer: Any = encoder_layer
        super().__init__(layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The output of all layers for src.

        Args:
            src, src_key_padding_mask: as for :meth:`TransformerEncoderLayer.forward`.
            mask: its src_mask.
            is_causal: as there. None: whether the mask is the causal one is found out by looking
                at it, to run the kernel that skips what no token sees. It is read as any other
                mask where there is nothing to look at (torch.compile, torch.export, torch.func)
                and where it wants a gradient.
        """
        is_causal = _is_causal(mask) if is_causal is None else is_causal
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=is_causal,
            )
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``: num_layers copies of a layer, and a norm behind them.

    Args:
        decoder_layer, num_layers, norm: as for :class:`TransformerEncoder`.

    >>> decoder = TransformerDecoder(TransformerDecoderLayer(32, 4), 2, LayerNorm(32))
    >>> decoder(torch.randn(10, 3, 32), torch.randn(7, 3, 32), tgt_is_causal=True).shape
    torch.Size([10, 3, 32])
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The output of all layers for tgt and memory.

        Args:
            tgt_is_causal: as is_causal of :meth:`TransformerEncoder.forward`, for tgt_mask.
            others: as for :meth:`TransformerDecoderLayer.forward`.
        """
        tgt_is_causal = _is_causal(tgt_mask) if tgt_is_causal is None else tgt_is_causal
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)


class Transformer(nn.Transformer):
    """``torch.nn.Transformer``: an encoder, and a decoder that attends to what it gives.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout,
        activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as in torch.
        custom_encoder, custom_decoder: modules to use as they are, called as torch calls them.

    Source: Vaswani et al., Attention Is All You Need (2017).

    >>> model = Transformer(32, 4, 2, 2, 64, batch_first=True)
    >>> model(torch.randn(3, 7, 32), torch.randn(3, 10, 32), tgt_is_causal=True).shape
    torch.Size([3, 10, 32])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        of_layers = (
            *(d_model, nhead, dim_feedforward, dropout, activation),
            *(layer_norm_eps, batch_first, norm_first, bias),
        )

        def norm() -> LayerNorm:
            return LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **place)

        # Encoder before decoder, as torch draws their values.
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*of_layers, **place)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*of_layers, **place)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        super().__init__(
            d_model,
            nhead,
            custom_encoder=custom_encoder,
            custom_decoder=custom_decoder,
            batch_first=batch_first,
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The decoder's output for tgt, with the encoder's for src as its memory.

        Args:
            src: (length, batch, d_model), (batch, length, d_model) with batch_first,
                (length, d_model), or jagged nested.
            tgt: likewise, with a length of its own; the output has its shape.
            src_mask, src_key_padding_mask, src_is_causal: as for
                :meth:`TransformerEncoder.forward`.
            others: as for :meth:`TransformerDecoder.forward`.

        Raises:
            ValueError, TypeError: name the argument.
        """
        self._require_pair(src, tgt)
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
        )
        output: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return output

    def _require_pair(self, src: Tensor, tgt: Tensor) -> None:
        for name, x in (("src", src), ("tgt", tgt)):
            if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
                raise ValueError(
                    f"{name}: expected 2 or 3 dimensions, the last of them {self.d_model}, "
                    f"got {tuple(x.shape)}"
                )
        if src.dim() != tgt.dim():
            raise ValueError(f"tgt: expected {src.dim()} dimensions like src, got {tgt.dim()}")
        nested = is_nested("src", src)
        if nested != is_nested("tgt", tgt):
            words = ("a dense", "a nested")
            raise ValueError(
                f"tgt: expected {words[nested]} tensor like src, got {words[not nested]} one"
            )
        batch = 0 if self.batch_first or nested else 1
        if src.dim() == 3 and src.shape[batch] != tgt.shape[batch]:
            raise ValueError(
                f"tgt: expected a batch of {src.shape[batch]} like src, got {tgt.shape[batch]}"
            )


def _is_causal(mask: Tensor | None) -> bool:
    """Whether the mask is the causal one, as far as it can be looked at."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    if torch.compiler.is_compiling() or is_transformed() or type(mask) is not Tensor:
        return False
    if mask.is_meta or mask.requires_grad:
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    hidden = True if mask.dtype == torch.bool else -math.inf
    return torch.equal(mask, torch.full_like(mask, hidden).triu(1))
