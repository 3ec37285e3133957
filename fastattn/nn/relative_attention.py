"""Attention by relative positions, as in Transformer-XL."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn._attention_call import default_head_dim, skewed
from fastattn.nn.cache.base import require_sizes
from fastattn.nn.positions import SinusoidalPositions

__all__ = ["RelativeAttention"]


class RelativeAttention(nn.Module):
    r"""Attention whose scores compare contents and distances, over x and a memory before it.

    ::

        source  = (memory, x)
        q, k, v = q_proj(x), k_proj(source), v_proj(source)
        r_d     = r_proj(P_d)                    P: sinusoidal positions, d = p_i - p_j
        s_ij    = scale ((q_i + u) . k_j + (q_i + w) . r_d)
        out_i   = o_proj(sum_j softmax_j(s_ij) v_j)

    with u = content_bias and w = position_bias, (heads, head_dim). The second product is made for
    each query and distance at once, (heads, queries, distances); the shift that turns distances
    into keys is a view of it, which the kernel adds to the scores as it makes them.

    Args:
        embed_dim: the size of the rows of x, memory and P.
        num_heads, head_dim: heads times head_dim need not be embed_dim, but are by default.
        causal: False lets every query see all keys, in both directions, as XLNet's do.
        scale: 1 / sqrt(head_dim) by default.
        dropout: of the weights, in training.
        bias: of q_proj, k_proj and v_proj, and of o_proj.

    Shapes: x (\*batch, length, embed_dim), memory (\*batch, memory length, embed_dim) -> as x.

    Source: Dai et al., Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context
    (2019), section 3.3.

    >>> attention = RelativeAttention(16, 2)
    >>> segments = torch.randn(1, 10, 16).split(5, dim=1)
    >>> out = attention(segments[1], memory=segments[0])
    >>> torch.testing.assert_close(out, attention(torch.cat(segments, dim=1))[:, 5:])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        causal: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(embed_dim=embed_dim, num_heads=num_heads)
        head_dim = default_head_dim(embed_dim, num_heads) if head_dim is None else head_dim
        require_sizes(head_dim=head_dim)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.causal = causal
        self.scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
        self.dropout = dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = num_heads * head_dim
        self.q_proj = nn.Linear(embed_dim, inner, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, inner, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, inner, bias=bias, **factory)
        self.r_proj = nn.Linear(embed_dim, inner, bias=False, **factory)
        self.o_proj = nn.Linear(inner, embed_dim, bias=bias, **factory)
        self.content_bias = nn.Parameter(torch.empty(num_heads, head_dim, **factory))
        self.position_bias = nn.Parameter(torch.empty(num_heads, head_dim, **factory))
        self.encoding = SinusoidalPositions(embed_dim, interleaved=False, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Those that are not of a projection: normal, with a deviation of 0.02."""
        nn.init.normal_(self.content_bias, std=0.02)
        nn.init.normal_(self.position_bias, std=0.02)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        r"""
        Args:
            memory: rows before x, of earlier segments; as many for each entry of the batch.
            mask: boolean, True = attend; broadcasts to (\*batch, heads, queries, keys).
            key_lengths: (\*batch), the valid rows of memory and x together.
        """
        if x.dim() < 2 or x.shape[-1] != self.embed_dim:
            shape = f"(*batch, length, {self.embed_dim})"
            raise ValueError(f"x: expected shape {shape}, got {tuple(x.shape)}")
        if memory is not None and (
            memory.shape[:-2] != x.shape[:-2] or memory.shape[-1:] != x.shape[-1:]
        ):
            raise ValueError(
                f"memory: expected the shape of x, {tuple(x.shape)}, but for its length, got "
                f"{tuple(memory.shape)}"
            )
        source = x if memory is None else torch.cat((memory, x), dim=-2)
        query, key, value = (
            projection(rows).unflatten(-1, (self.num_heads, self.head_dim))
            for projection, rows in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        out = functional.attention(
            *(query + self.content_bias, key, value),
            bias=self._distance_scores(query, source.shape[-2]),
            causal=self.causal,
            mask=mask,
            key_lengths=key_lengths,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            layout="bshd",
        )
        assert isinstance(out, Tensor)
        projected: Tensor = self.o_proj(out.flatten(-2))
        return projected

    def _distance_scores(self, query: Tensor, keys: int) -> Tensor:
        """scale (q_i + w) . r_d, (\\*batch, heads, queries, keys)."""
        queries = query.shape[-3]
        # Column c is distance keys - 1 - c: at least one more than any query sees.
        columns = keys + 1 if self.causal else keys + queries + 1
        distances = keys - 1 - torch.arange(columns, device=query.device)
        encoding = self._encoding(distances).to(query.dtype)
        r = self.r_proj(encoding).unflatten(-1, (self.num_heads, self.head_dim))
        biased = (query + self.position_bias) * self.scale
        scores = torch.einsum("...qhd,chd->...hqc", biased, r)
        return skewed(scores, max(queries - 1, 0), keys)

    def _encoding(self, distances: Tensor) -> Tensor:
        """P of distances, which may be negative: sin is odd, cos is even."""
        half = self.embed_dim - self.embed_dim // 2
        rows = self.encoding.rows(distances.shape[0], positions=distances.abs())
        sign = torch.where(distances < 0, -1.0, 1.0).to(rows.dtype).unsqueeze(-1)
        return torch.cat((rows[:, :half] * sign, rows[:, half:]), dim=-1)

    def extra_repr(self) -> str:
        given = f"{self.embed_dim}, {self.num_heads}, head_dim={self.head_dim}"
        given += "" if self.causal else ", causal=False"
        return given + (f", dropout={self.dropout}" if self.dropout else "")
