"""Where a token stands: sinusoidal, learned, rotary and ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn._tables import TableModule
from fastattn.nn.cache.base import require_sizes

__all__ = ["ALiBi", "LearnedPositions", "RotaryEmbedding", "SinusoidalPositions"]


class RotaryEmbedding(TableModule):
    r"""The tables of rotary position embedding, for :class:`fastattn.nn.Attention`.

    ::

        f_n       = base^(-2 n / rotary_dim)             n = 0 .. rotary_dim / 2 - 1
        cos[p, n] = cos(p f_n)
        sin[p, n] = sin(p f_n)                           scaling changes f, as rope_tables says

    One module serves all layers of a model. Its buffers ``cos`` and ``sin``, (rows, rotary_dim /
    2), are not part of the state, and stay float32 in a 16-bit model.

    Args:
        rotary_dim: how many columns of each head are rotated, even; the others are left alone.
        max_length: the rows of the tables. They grow where a longer sequence comes, but not in a
            compiled graph, and not by what only a tensor tells (``positions``, the lengths of a
            sliding-window cache): there a position beyond them raises, or on CUDA gives NaN.
        base: of the frequencies, Hugging Face's rope_theta.
        scaling: a dictionary as Hugging Face's ``rope_scaling``: "linear", "ntk", "dynamic",
            "yarn" or "llama3"; see :func:`fastattn.functional.rope_tables`. With "dynamic" the
            frequencies are those for the length of each call, or for the capacity of its cache.
        interleaved: which columns make a pair: (2i, 2i + 1), and not (i, i + rotary_dim / 2).

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021).

    >>> rope = RotaryEmbedding(8, max_length=16)
    >>> q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)  # (batch, length, heads, head_dim)
    >>> rotated_q, rotated_k = rope(q, k)
    >>> torch.equal(rotated_q[:, 0], q[:, 0])  # position 0
    True
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_length: int = 2048,
        *,
        base: float = 10000.0,
        scaling: dict[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        require_sizes(rotary_dim=rotary_dim, max_length=max_length)
        self.rotary_dim = rotary_dim
        self.max_length = max_length
        self.base = base
        self.scaling = None if scaling is None else dict(scaling)
        self.interleaved = interleaved
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type"))
        self._dynamic = kind == "dynamic"
        self._register_tables(("cos", "sin"), self._rows(max_length), device)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) with at least ``length`` rows.

        Raises:
            ValueError: for more rows than there are, in a compiled graph.
        """
        if not self.covers(length):
            self._require_eager(length)
            if self._dynamic:
                self._set_tables(self._rows(length), self.cos.dtype, self.cos.device)
            else:
                self._grow_tables(length)
        return self.cos, self.sin

    def covers(self, length: int) -> bool:
        """Whether the tables are there for sequences of so many rows."""
        if self._dynamic:
            return self._rows(length) == self._table_rows
        return length <= self._table_rows

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        positions: Tensor | None = None,
        *,
        length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""query and key, (\*batch, length, heads, head_dim), rotated.

        Args:
            positions: (length,) or (\*batch, length), by default 0, 1, ...
            length: the rows that the tables need, by default those of query.
        """
        cos, sin = self.tables(query.shape[-3] if length is None else length)
        return functional.apply_rope_qk(
            *(query, key, cos, sin),
            interleaved=self.interleaved,
            positions=positions,
            layout="bshd",
        )

    def extra_repr(self) -> str:
        given = f"{self.rotary_dim}, max_length={self.max_length}, base={self.base}"
        given += "" if self.scaling is None else f", scaling={self.scaling}"
        return given + (", interleaved=True" if self.interleaved else "")

    def _rows(self, length: int) -> int:
        """The rows of the tables; those of dynamic scaling have as many as their frequencies are
        for."""
        if self._dynamic:
            assert self.scaling is not None
            return int(max(length, self.scaling.get("original_max_position_embeddings", 0)))
        return length

    def _compute(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        cos, sin = functional.rope_tables(
            *(self.rotary_dim, rows),
            base=self.base,
            scaling=self.scaling,
            dtype=dtype,
            device=device,
        )
        return [cos, sin]

    def _require_eager(self, length: int) -> None:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"max_length: expected a RotaryEmbedding with tables for {length} rows, which a "
                f"compiled graph cannot make, got {self._table_rows}"
            )


class SinusoidalPositions(TableModule):
    r"""Adds the sinusoidal position encoding of the original Transformer.

    ::

        P[p, 2 i]     = sin(p / base^(2 i / embed_dim))
        P[p, 2 i + 1] = cos(p / base^(2 i / embed_dim))
        out_p         = x_p + P[p]                       dropout(x_p + P[p]) in training

    Args:
        embed_dim: the size of a row.
        max_length: the rows of the table, which grows as that of :class:`RotaryEmbedding` does.
        base: of the wavelengths. (Whisper's and M2M-100's is 10000^(n / (n - 1)), n = embed_dim /
            2.)
        interleaved: False puts all sines before all cosines, as in Marian, Pegasus and Whisper.
        dropout: of the sum.

    Shapes: x (\*batch, length, embed_dim) -> the same; the dtype of x.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.5.

    >>> encode = SinusoidalPositions(6, max_length=10)
    >>> [round(x, 4) for x in encode(torch.zeros(1, 3, 6))[0, 2, :2].tolist()]
    [0.9093, -0.4161]
    """

    table: Tensor

    def __init__(
        self,
        embed_dim: int,
        max_length: int = 2048,
        *,
        base: float = 10000.0,
        interleaved: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        require_sizes(embed_dim=embed_dim, max_length=max_length)
        self.embed_dim = embed_dim
        self.max_length = max_length
        self.base = base
        self.interleaved = interleaved
        self.dropout = nn.Dropout(dropout)
        self._register_tables(("table",), max_length, device)

    def rows(
        self, length: int, *, positions: Tensor | None = None, offset: int | Tensor = 0
    ) -> Tensor:
        """P at positions + offset, by default 0 .. length - 1: (length, embed_dim), with a batch
        before it where positions or offset have one."""
        last = length + offset if isinstance(offset, int) and positions is None else length
        if last > self._table_rows:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"max_length: expected at least {last}, as a compiled graph cannot make the "
                    f"table longer, got {self._table_rows}"
                )
            self._grow_tables(last)
        return _rows(self.table, length, positions, offset)

    def forward(
        self, x: Tensor, *, positions: Tensor | None = None, offset: int | Tensor = 0
    ) -> Tensor:
        r"""x + P.

        Args:
            positions: (length) or (\*batch, length), by default 0, 1, ...
            offset: an integer, or a tensor (batch), for instance a cache's ``lengths``.
        """
        _require_rows(x, self.embed_dim)
        rows = self.rows(x.shape[-2], positions=positions, offset=offset)
        summed: Tensor = self.dropout(x + rows.to(x.dtype))
        return summed

    def extra_repr(self) -> str:
        given = f"{self.embed_dim}, max_length={self.max_length}, base={self.base}"
        return given + ("" if self.interleaved else ", interleaved=False")

    def _compute(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        even = self.embed_dim + self.embed_dim % 2
        base = self.base ** (even / self.embed_dim)  # the exponents are n / embed_dim
        cos, sin = functional.rope_tables(even, rows, base=base, dtype=dtype, device=device)
        if self.interleaved:
            table = torch.stack((sin, cos), dim=-1).flatten(-2)
        else:
            table = torch.cat((sin, cos), dim=-1)
        return [table[:, : self.embed_dim].contiguous()]


class LearnedPositions(nn.Module):
    r"""Adds a learned row for each position: out_p = x_p + weight[p + shift].

    Args:
        max_length: the positions there are.
        embed_dim: the size of a row.
        shift: unused rows in front (2 in OPT and BART, padding_idx + 1 in RoBERTa), so that
            ``weight`` is theirs: (max_length + shift, embed_dim).
        dropout: of the sum, in training.

    Shapes: x (\*batch, length, embed_dim) -> the same. ``weight`` begins as that of nn.Embedding.

    Source: Gehring et al., Convolutional Sequence to Sequence Learning (2017).

    >>> encode = LearnedPositions(16, 6)
    >>> x = torch.randn(2, 3, 6)
    >>> torch.equal(encode(x, offset=4), x + encode.weight[4:7])
    True
    """

    def __init__(
        self,
        max_length: int,
        embed_dim: int,
        *,
        shift: int = 0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(max_length=max_length, embed_dim=embed_dim)
        require_sizes(shift=shift, least=0)
        self.max_length = max_length
        self.embed_dim = embed_dim
        self.shift = shift
        self.weight = nn.Parameter(
            torch.empty(max_length + shift, embed_dim, device=device, dtype=dtype)
        )
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(
        self, x: Tensor, *, positions: Tensor | None = None, offset: int | Tensor = 0
    ) -> Tensor:
        """x + weight at positions + offset, as :meth:`SinusoidalPositions.forward` takes them.

        Raises:
            ValueError: for a position beyond max_length.
        """
        _require_rows(x, self.embed_dim)
        length = x.shape[-2]
        last = length + offset if isinstance(offset, int) else length
        if positions is None and last > self.max_length:
            raise ValueError(f"x: expected at most {self.max_length} positions, got {last}")
        rows = _rows(self.weight[self.shift :], length, positions, offset)
        summed: Tensor = self.dropout(x + rows)
        return summed

    def extra_repr(self) -> str:
        given = f"{self.max_length}, {self.embed_dim}"
        return given + (f", shift={self.shift}" if self.shift else "")


class ALiBi(TableModule):
    """The slopes of attention with linear biases: forward() gives them, (num_heads), float32.

    ::

        s_ij += -slope_h |p_j - p_i|,    slope_h = 2^(-8 h / n)    h = 1 .. n, n a power of two

    for another number of heads see :func:`fastattn.functional.alibi_slopes`. No bias is ever
    materialised: :class:`fastattn.nn.Attention` (alibi=True) hands the slopes to the kernel.

    Source: Press et al., Train Short, Test Long (2022).

    >>> ALiBi(4)().tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """

    slopes: Tensor

    def __init__(self, num_heads: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        require_sizes(num_heads=num_heads)
        self.num_heads = num_heads
        self._register_tables(("slopes",), num_heads, device)

    def forward(self) -> Tensor:
        return self.slopes

    def extra_repr(self) -> str:
        return str(self.num_heads)

    def _compute(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        return [functional.alibi_slopes(rows, device=device).to(dtype)]


def packed_positions(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(rows,): the position of each packed row in its own sequence; int64.

    Rows behind the last sequence go on counting from its first row.

    >>> packed_positions(torch.tensor([0, 3, 5]), 5)
    tensor([0, 1, 2, 0, 1])
    """
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    starts = cu_seqlens[:-1]
    sequence = torch.searchsorted(starts, row, right=True) - 1
    return (row - starts[sequence.clamp(min=0)]).to(torch.int64)


def _rows(table: Tensor, length: int, positions: Tensor | None, offset: int | Tensor) -> Tensor:
    """The rows of a table at positions + offset."""
    if positions is None and isinstance(offset, int):
        return table[offset : offset + length]
    if positions is None:
        positions = torch.arange(length, device=table.device)
    if isinstance(offset, Tensor):
        offset = offset.unsqueeze(-1)
    try:
        return nn.functional.embedding(positions + offset, table)
    except IndexError:
        raise ValueError(
            f"positions: expected numbers (with offset) from 0 to {len(table) - 1}, the last row "
            "(max_length), got another"
        ) from None


def _require_rows(x: Tensor, embed_dim: int) -> None:
    if x.dim() < 2 or x.shape[-1] != embed_dim:
        raise ValueError(f"x: expected shape (*batch, length, {embed_dim}), got {tuple(x.shape)}")
