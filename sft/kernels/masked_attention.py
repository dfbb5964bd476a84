"""Causal attention in plain torch where queries are the last positions, see a window, or have capped scores or sinks.

torch's own kernels have neither caps nor sinks. Such attention is computed in blocks of queries, each with the keys
that it sees, and again in backward, so that no more than a block's scores are ever held.
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


def attention_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(scores) value over the keys that each query sees, scores = scale * query key^T.

    With a `cap` scores s are cap * tanh(s / cap). Each of the `sinks` [heads] is one more entry of its head's softmax,
    and has no value. query [..., heads, s, dim], the last positions; key and value [..., groups, u, dim]; `scale` None
    means 1 / sqrt(dim). The result has the query's shape. Cap and softmax are in fp32 or wider.
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    parts, before = [], key.size(-2) - query.size(-2)
    for block in query.split(BLOCK, dim=-2):
        before += block.size(-2)
        seen = (last_keys(tensor[..., :before, :], block.size(-2), window) for tensor in (key, value))
        part = checkpoint(
            _block, block, *seen, sinks, cap, window, scale, dropout,
            use_reentrant=False, preserve_rng_state=dropout > 0,
        )  # fmt: skip
        assert isinstance(part, Tensor)
        parts.append(part)
    return torch.cat(parts, dim=-2)


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cap: float | None,
    window: int | None,
    scale: float,
    dropout: float,
) -> Tensor:
    # Query heads that share keys and values are a dimension of their own.
    grouped = query.unflatten(-3, (key.size(-3), -1))
    scores = grouped @ key.unsqueeze(-3).transpose(-1, -2)
    # In bf16 numbers near a cap of 50 would be 0.25 apart.
    scores = scores.float() if scores.dtype.itemsize < 4 else scores
    scores = scores * scale if cap is None else cap * torch.tanh(scores * (scale / cap))
    hidden = ~causal_mask(query.size(-2), key.size(-2), window, query.device)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        column = sinks.to(scores.dtype).view(key.size(-3), -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return (F.dropout(weights.to(value.dtype), dropout) @ value.unsqueeze(-3)).flatten(-4, -3)
