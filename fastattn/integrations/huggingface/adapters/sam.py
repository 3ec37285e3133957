"""SAM's vision encoder: attention over a grid, with decomposed relative positions.

Its mask decoder goes through transformers' interface.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.sam import modeling_sam

from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]

_LARGEST_HEAD_DIM = 256  # of the CUDA kernels


class FusedSamVisionAttention(modeling_sam.SamVisionAttention):
    """The score of a query at (y, x) and a key at (u, v)::

        s = scale * q . k + q . R_h[y - u] + q . R_w[x - v]

    The last two terms have few values for each query: one of each row of the grid and one of each
    column. They become further columns of q, and k gets a 1 in the columns of its row and column,
    so that no bias of (tokens, tokens) is ever made. Where that makes rows too long, it is.

    Source: Kirillov et al., Segment Anything (2023); Li et al., MViTv2 (2022).
    """

    def forward(
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        batch, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, height * width, 3, self.num_attention_heads, -1)
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))

        bias = None
        scaled = query * self.scale
        if self.use_rel_pos:
            of_row, of_column = self._relative_scores(query, height, width)
            if query.shape[-1] + height + width <= _LARGEST_HEAD_DIM:
                scaled = torch.cat((scaled, of_row, of_column), -1)
                key = torch.cat((key, _places(key, height, width)), -1)
            else:
                bias = (of_row.unsqueeze(-1) + of_column.unsqueeze(-2)).flatten(-2)

        out, weights = attention_forward(
            self,
            scaled,
            key,
            value,
            None,
            dropout=self.dropout if self.training else 0.0,
            scaling=1.0,
            is_causal=False,
            position_bias=bias,
            output_attentions=bool(output_attentions),
        )
        out = self.proj(out.reshape(batch, height, width, -1))
        return out, None if weights is None else weights.flatten(0, 1)

    def _relative_scores(self, query: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(batch, heads, tokens, height) and (batch, heads, tokens, width)"""
        grid = query.view(*query.shape[:2], height, width, -1)
        rows = self.get_rel_pos(height, height, self.rel_pos_h)
        columns = self.get_rel_pos(width, width, self.rel_pos_w)
        return (
            torch.einsum("bnyxc,yuc->bnyxu", grid, rows).flatten(2, 3),
            torch.einsum("bnyxc,xvc->bnyxv", grid, columns).flatten(2, 3),
        )


def _places(key: Tensor, height: int, width: int) -> Tensor:
    """(batch, heads, tokens, height + width): 1 for a token's row, and 1 for its column"""
    row = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, dim=0)
    column = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
    return torch.cat((row, column), -1).expand(*key.shape[:2], -1, -1)


class FusedSamVisionSdpaAttention(FusedSamVisionAttention, modeling_sam.SamVisionSdpaAttention):
    """What a model has that was loaded with the implementation "sdpa": the same formula."""


REPLACEMENTS = {
    modeling_sam.SamVisionAttention: FusedSamVisionAttention,
    modeling_sam.SamVisionSdpaAttention: FusedSamVisionSdpaAttention,
}
