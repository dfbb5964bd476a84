"""Queries that grow with their positions, as Llama 4 and Ministral 3 have it: far tokens keep their attention."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.models.architecture import QueryScale


def scaled_by_position(query: Tensor, scale: QueryScale, positions: Tensor | None, begin: int = 0) -> Tensor:
    """Return `query`, [s, b, heads, dim], times the factor of each token's position.

    `positions`, [s], are those within the tokens' own sequences; None where they count up from `begin`.
    """
    if positions is None:
        positions = torch.arange(begin, begin + query.shape[0], device=query.device)
    factor = 1 + scale.growth * torch.log(1 + torch.floor(positions / scale.every))
    return query * factor[:, None, None, None].to(query.dtype)
