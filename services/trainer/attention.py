"""Attention over rows that lie one behind the other: each row sees itself alone.

Rows of different lengths in one matrix would be padded to the longest; here they are packed into
one sequence instead, and only attention looks at where they part. On a CPU, and wherever the
kernel for such sequences does not fit, each row gets a call of its own, so attention costs what its
rows cost and not what the whole sequence would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "documents"
# Queries of a row longer than the window that are looked at together: what each of them may see is
# then a matrix of length x (window + this), not length x length.
_BLOCK = 512


@dataclass(frozen=True)
class Documents:
    """Where the rows of a packed sequence part. bounds: int32 [rows + 1], from 0 to its length."""

    lengths: tuple[int, ...]
    bounds: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Documents:
        bounds = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        return cls(tuple(lengths), bounds.to(device))


def install(model: Any) -> None:
    """Let a model take `documents=` in its forward; without it a sequence is one row."""
    model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention; query [B, heads, T, D] to [B, T, heads, D]. B is 1 with `documents`."""
    if documents is None or len(documents.lengths) == 1:
        found = _rows(query, key, value, scaling, sliding_window)
        return found.transpose(1, 2), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, scaling, documents, sliding_window), None
    lengths = list(documents.lengths)
    # `split`, not slices: the gradient of a slice is as long as the whole sequence.
    parts = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    rows = [_rows(q, k, v, scaling, sliding_window).transpose(1, 2) for q, k, v in parts]
    return torch.cat(rows, dim=1), None


def _rows(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    length = query.shape[2]
    shared = query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=shared
        )
    parts = []
    for start, part in zip(range(0, length, _BLOCK), query.split(_BLOCK, dim=2), strict=True):
        first, end = max(0, start - window + 1), start + part.shape[2]
        at = torch.arange(start, end, device=query.device)[:, None]
        back = at - torch.arange(first, end, device=query.device)
        found = scaled_dot_product_attention(
            part,
            key[:, :, first:end],
            value[:, :, first:end],
            attn_mask=(back >= 0) & (back < window),
            scale=scaling,
            enable_gqa=shared,
        )
        parts.append(found)
    return torch.cat(parts, dim=2)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    documents: Documents,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(documents.lengths)
    found: Tensor = varlen_attn(
        *(each.squeeze(0).transpose(0, 1).contiguous() for each in (query, key, value)),
        cu_seq_q=documents.bounds,
        cu_seq_k=documents.bounds,
        max_q=longest,
        max_k=longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found[None]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
