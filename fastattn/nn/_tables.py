"""Tables that a formula gives: not parameters, not in the state, and never rounded to 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TableModule"]


class TableModule(nn.Module):
    """A module whose buffers are functions of its arguments and of a number of rows.

    The buffers are not persistent. They are integers or float32, or float64 in a float64 module:
    in bfloat16 far positions would coincide, so ``.to(bfloat16)`` and ``.half()`` leave them as
    they are. A module that was made on the meta device gets its tables with its memory.
    """

    def _compute(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """The buffers, in the order of their names."""
        raise NotImplementedError

    def _register_tables(
        self, names: tuple[str, ...], rows: int, device: torch.device | str | None
    ) -> None:
        self._table_names = names
        self._table_rows = rows
        device = torch.get_default_device() if device is None else device
        wide = _wide(torch.get_default_dtype())
        for name, table in zip(names, self._compute(rows, wide, device), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _set_tables(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._table_rows = rows
        for name, table in zip(self._table_names, self._compute(rows, dtype, device), strict=True):
            setattr(self, name, table)

    def _grow_tables(self, rows: int) -> None:
        """Makes the tables longer; at least twice as long, as one who grows does so again."""
        first = getattr(self, self._table_names[0])
        self._set_tables(max(rows, 2 * self._table_rows), first.dtype, first.device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = [getattr(self, name) for name in self._table_names]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in zip(self._table_names, before, strict=True):
            new = getattr(self, name)
            wide = _wide(new.dtype)
            if new.is_meta != old.is_meta or wide != old.dtype:
                self._set_tables(self._table_rows, wide, new.device)
                break
            # A module that several others share is visited once for each: what the first visit made
            # of meta tables must outlive the next, whose function may only give empty memory.
            if new is not old:
                setattr(self, name, old.to(new.device))
        return self


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
