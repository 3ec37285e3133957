"""Learned biases of the scores, by the distance of query and key: T5's, Swin's and BEiT's.

Each is called as :class:`fastattn.nn.Attention` calls its ``relative_bias``: with the numbers of
queries and keys, and the position of the first query.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn._attention_call import skewed
from fastattn.nn._tables import TableModule
from fastattn.nn.cache.base import require_sizes

__all__ = ["RelativeBias2d", "T5RelativeBias"]


class T5RelativeBias(nn.Module):
    r"""A learned bias for each head and bucket of distances, near ones finer than far ones.

    ::

        bias[h, i, j] = weight[bucket(j - i - query_offset), h]

        b = num_buckets, or num_buckets / 2 for each sign where bidirectional; e = b / 2
        n = |distance|, or 0 for a later key in a causal decoder
        bucket = n                                                          n < e
                 min(e + (b - e) log(n / e) / log(max_distance / e), b - 1)     else, rounded down
                 + b where bidirectional and the key is the later one

    Args:
        num_heads: heads of the attention.
        num_buckets: rows of the table.
        max_distance: from here on all is one bucket.
        bidirectional: whether the sign of a distance matters (encoders), or only keys before the
            query are told apart (decoders).

    The table is ``relative_attention_bias.weight``, (num_buckets, num_heads), as in Hugging Face's
    T5, mT5 and UMT5. MPNet's is the same, bidirectional.

    Source: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer (2020), section 2.1.

    >>> bias = T5RelativeBias(4)
    >>> bias(5, 7).shape, bias(1, 7, query_offset=torch.tensor([6, 2])).shape
    (torch.Size([1, 4, 5, 7]), torch.Size([2, 4, 1, 7]))
    >>> torch.equal(bias(1, 7, query_offset=6), bias(7, 7)[:, :, 6:])
    True
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        least = 4 if bidirectional else 2
        require_sizes(num_heads=num_heads)
        require_sizes(num_buckets=num_buckets, least=least)
        if num_buckets % least:
            raise ValueError(f"num_buckets: expected a multiple of {least}, got {num_buckets}")
        require_sizes(max_distance=max_distance, least=num_buckets // least + 1)
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.relative_attention_bias = nn.Embedding(
            num_buckets, num_heads, device=device, dtype=dtype
        )

    def forward(
        self, query_length: int, key_length: int, *, query_offset: int | Tensor = 0
    ) -> Tensor:
        """(1, heads, query_length, key_length); (batch, ...) for a query_offset of shape (batch),
        for instance the lengths of a cache."""
        weight = self.relative_attention_bias.weight
        # All that occurs is one row of distances, which every query shifts by one. (There is one
        # more than needed at each end, so that no size is ever negative.)
        distances = torch.arange(-query_length, key_length + 1, device=weight.device)
        if isinstance(query_offset, Tensor):
            distances = distances - query_offset.unsqueeze(-1)
        else:
            distances = (distances - query_offset).unsqueeze(0)
        values = nn.functional.embedding(self._buckets(distances), weight).mT.unsqueeze(-2)
        # A copy: inductor takes the strides of such a view, which depend on the length, for fixed.
        skew = skewed(values.expand(-1, -1, query_length, -1), query_length, key_length)
        return skew.contiguous()

    def _buckets(self, distances: Tensor) -> Tensor:
        buckets, far_side = self.num_buckets, 0
        if self.bidirectional:
            buckets //= 2
            side: Any = (distances > 0) * buckets
            far_side, distances = side, distances.abs()
        else:
            distances = (-distances).clamp(min=0)
        exact = buckets // 2
        # In float32, as T5 computes it: its checkpoints depend on where that rounds.
        ratio = torch.log(distances.clamp(min=exact).float() / exact)
        steps = ratio / math.log(self.max_distance / exact) * (buckets - exact)
        logarithmic = (exact + steps.to(distances.dtype)).clamp(max=buckets - 1)
        return torch.where(distances < exact, distances, logarithmic) + far_side

    def extra_repr(self) -> str:
        given = f"{self.num_heads}, num_buckets={self.num_buckets}"
        given += f", max_distance={self.max_distance}"
        return given + ("" if self.bidirectional else ", bidirectional=False")


class RelativeBias2d(TableModule):
    r"""A learned bias for each head and offset of two places in a window of (height, width).

    ::

        bias[h, i, j] = table[(y_i - y_j + height - 1) (2 width - 1) + x_i - x_j + width - 1, h]

    Token i stands at y_i = i // width, x_i = i % width. With class_token, token 0 has no place, and
    three more rows of the table are for it: as query, as key, as both.

    Args:
        window: (height, width).
        num_heads: heads of the attention.
        class_token: whether token 0 is a class token, as in BEiT.

    The table is ``relative_position_bias_table``, ((2 height - 1) (2 width - 1) [+ 3], num_heads),
    as in Hugging Face's Swin and BEiT. It begins normal with a deviation of 0.02 (Swin).

    Source: Liu et al., Swin Transformer (2021), section 3.2; Bao et al., BEiT (2021).

    >>> bias = RelativeBias2d((7, 7), num_heads=3)
    >>> bias(49, 49).shape
    torch.Size([1, 3, 49, 49])
    """

    relative_position_index: Tensor

    def __init__(
        self,
        window: tuple[int, int],
        num_heads: int,
        *,
        class_token: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = window
        require_sizes(window=height)
        require_sizes(window=width)
        require_sizes(num_heads=num_heads)
        self.window = (height, width)
        self.num_heads = num_heads
        self.class_token = class_token
        rows = (2 * height - 1) * (2 * width - 1) + 3 * class_token
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(rows, num_heads, device=device, dtype=dtype)
        )
        self._register_tables(("relative_position_index",), rows, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    @property
    def length(self) -> int:
        """The tokens of a window."""
        return self.window[0] * self.window[1] + self.class_token

    def forward(
        self,
        query_length: int | None = None,
        key_length: int | None = None,
        *,
        query_offset: int | Tensor = 0,
    ) -> Tensor:
        """(1, heads, length, length), where length is the number of tokens of a window.

        Raises:
            ValueError: for another query_length, key_length or query_offset.
        """
        for name, given in (("query_length", query_length), ("key_length", key_length)):
            if given not in (None, self.length):
                raise ValueError(f"{name}: expected {self.length}, all of a window, got {given}")
        if not isinstance(query_offset, int) or query_offset != 0:
            raise ValueError(f"query_offset: expected 0, got {query_offset}")
        table = self.relative_position_bias_table
        values = nn.functional.embedding(self.relative_position_index, table)
        return values.permute(2, 0, 1).unsqueeze(0)

    def _compute(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """(length, length): the row of the table for each pair of tokens."""
        height, width = self.window
        places = torch.cartesian_prod(
            torch.arange(height, device=device), torch.arange(width, device=device)
        ).reshape(-1, 2)
        y, x = (places[:, None] - places).unbind(-1)
        index = (y + height - 1) * (2 * width - 1) + x + width - 1
        if not self.class_token:
            return [index]
        with_token = nn.functional.pad(index, (1, 0, 1, 0))
        with_token[0], with_token[:, 0], with_token[0, 0] = rows - 3, rows - 2, rows - 1
        return [with_token]

    def extra_repr(self) -> str:
        given = f"{self.window}, {self.num_heads}"
        return given + (", class_token=True" if self.class_token else "")
