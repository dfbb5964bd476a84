"""Causal attention in plain torch where queries are the last positions, see a window, or have capped scores.

torch's own kernels have no cap. Capped attention is computed in blocks of queries, each with the keys that it sees, and
again in backward, so that no more than a block's scores are ever held.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 512
"""Queries of a block: their products are large, and their scores a few hundred MiB."""


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which of the keys each query sees, [queries, keys], where the queries are the last of the positions.

    With a window each query sees that many of the positions up to its own, which is the last of them.
    """
    last = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(last)
    return mask if window is None else mask.triu(last - window + 1)


def last_keys(keys: Tensor, queries: int, window: int | None) -> Tensor:
    """Return the keys (or values) [..., s, dim] that the last `queries` positions see any of, given their window."""
    return keys if window is None else keys[..., max(keys.size(-2) - queries - window + 1, 0) :, :]


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cap: float,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(cap * tanh(scale * query key^T / cap)) value, over the keys that each query sees.

    query [..., heads, s, dim], the last positions; key and value [..., groups, u, dim]; `scale` None means
    1 / sqrt(dim). The result has the query's shape. Cap and softmax are in fp32 or wider.
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    parts, before = [], key.size(-2) - query.size(-2)
    for block in query.split(BLOCK, dim=-2):
        before += block.size(-2)
        seen = (last_keys(tensor[..., :before, :], block.size(-2), window) for tensor in (key, value))
        part = checkpoint(
            _capped_block, block, *seen, cap, window, scale, dropout,
            use_reentrant=False, preserve_rng_state=dropout > 0,
        )  # fmt: skip
        assert isinstance(part, Tensor)
        parts.append(part)
    return torch.cat(parts, dim=-2)


def _capped_block(
    query: Tensor, key: Tensor, value: Tensor, cap: float, window: int | None, scale: float, dropout: float
) -> Tensor:
    # Query heads that share keys and values are a dimension of their own.
    grouped = query.unflatten(-3, (key.size(-3), -1))
    scores = grouped @ key.unsqueeze(-3).transpose(-1, -2)
    # In bf16 numbers near a cap of 50 would be 0.25 apart.
    scores = scores.float() if scores.dtype.itemsize < 4 else scores
    scores = cap * torch.tanh(scores * (scale / cap))
    hidden = ~causal_mask(query.size(-2), key.size(-2), window, query.device)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return (F.dropout(weights.to(value.dtype), dropout) @ value.unsqueeze(-3)).flatten(-4, -3)
