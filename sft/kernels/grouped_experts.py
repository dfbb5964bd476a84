"""Operations of a mixture of experts: tokens sorted by their experts, one product for all experts, and back.

Nothing is dropped and no capacity is set. Sorting is stable and no sum is made by atomic additions, so that two runs on
a GPU give the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.autograd import Context


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which rows of a sorted batch are which token's: token t's k-th expert computes row `place[t * chosen + k]`."""

    source: Tensor
    """For each sorted row t * chosen + k, [tokens * chosen]."""
    place: Tensor
    """The inverse of `source`."""
    ends: Tensor
    """For each expert the row behind its last one, int32 [experts]."""
    chosen: int
    """Experts of a token."""


def assign(experts: Tensor, count: int) -> Assignment:
    """Sort tokens by their experts, [tokens, chosen], of which there are `count`."""
    flat = experts.flatten()
    ordered, source = torch.sort(flat, stable=True)
    place = torch.empty_like(source)
    place[source] = torch.arange(len(source), device=source.device)
    # A search instead of a histogram, which a GPU would count with atomic additions.
    ends = torch.searchsorted(ordered, torch.arange(count, device=flat.device), right=True)
    return Assignment(source, place, ends.to(torch.int32), experts.size(-1))


def to_experts(tokens: Tensor, assignment: Assignment) -> Tensor:
    """Return the tokens, [tokens, hidden], once for each of their experts, sorted by expert."""
    rows: Tensor = _ToExperts.apply(tokens, assignment)
    return rows


def from_experts(rows: Tensor, weights: Tensor, assignment: Assignment) -> Tensor:
    """Return the sum of each token's rows, [tokens, hidden] in fp32, weighted by `weights`, [tokens, chosen]."""
    unsorted: Tensor = _Unsort.apply(rows, assignment)
    by_token = unsorted.view(-1, assignment.chosen, rows.size(-1))
    return (by_token.float() * weights.float().unsqueeze(-1)).sum(1)


def expert_products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each expert, sorted, by its matrix: [rows, in] and [experts, out, in] -> [rows, out]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        grouped = cast(Callable[..., Tensor], F.grouped_mm)
        return grouped(rows, weights.transpose(1, 2), offs=ends)
    return looped_products(rows, weights, ends)


def looped_products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return `expert_products`, one product after another, in any number type. The host reads the sizes."""
    bounds = [0, *ends.tolist()]
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    parts = [F.linear(part, weight) for part, weight in zip(rows.split(sizes), weights, strict=True)]
    return torch.cat(parts)


class _Context(Context, Protocol):
    assignment: Assignment


class _ToExperts(torch.autograd.Function):
    """A gather whose backward pass gathers, too: indexing's own would add up with atomic additions."""

    @staticmethod
    def forward(ctx: _Context, tokens: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return tokens.index_select(0, assignment.source // assignment.chosen)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        assignment = ctx.assignment
        (grad,) = grads
        by_token = grad.index_select(0, assignment.place).view(-1, assignment.chosen, grad.size(-1))
        return by_token.sum(1, dtype=torch.float32).to(grad.dtype), None


class _Unsort(torch.autograd.Function):
    """Put sorted rows back in the order of the tokens; backward by the inverse permutation."""

    @staticmethod
    def forward(ctx: _Context, rows: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return rows.index_select(0, assignment.place)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        assignment = ctx.assignment
        (grad,) = grads
        return grad.index_select(0, assignment.source), None
