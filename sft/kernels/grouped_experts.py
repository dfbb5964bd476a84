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
from sft.kernels.gradient_buffer import buffer_of
from sft.kernels.products import add_product, set_product


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

    def counts(self) -> Tensor:
        """Return the number of rows of each expert, int64 [experts]."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1)).long()


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


def sum_of_experts(rows: Tensor, assignment: Assignment) -> Tensor:
    """Return the sum of each token's rows, [tokens, hidden], added up in fp32."""
    tokens: Tensor = _SumOfExperts.apply(rows, assignment)
    return tokens


def sort_rows(values: Tensor, assignment: Assignment) -> Tensor:
    """Return what tokens have for each of their experts, [tokens * chosen, ...], sorted by expert."""
    rows: Tensor = _Permute.apply(values, assignment.source, assignment.place)
    return rows


def unsort_rows(rows: Tensor, assignment: Assignment) -> Tensor:
    """Return sorted rows in the order of the tokens, each token's `chosen` rows one after another."""
    values: Tensor = _Permute.apply(rows, assignment.place, assignment.source)
    return values


def expert_products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each expert, sorted, by its matrix: [rows, in] and [experts, out, in] -> [rows, out]."""
    output: Tensor = _Products.apply(rows, weights, ends)
    return output


def _product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if not len(rows):  # torch's grouped product may refuse it, and other ranks would wait for this one
        return rows.new_zeros(0, weights.size(1))
    if rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and _is_aligned(weights):
        grouped = cast(Callable[..., Tensor], F.grouped_mm)
        return grouped(rows, weights.transpose(1, 2), offs=ends)
    return looped_products(rows, weights, ends)


def _is_aligned(weights: Tensor) -> bool:
    """Return whether rows and columns are multiples of 16 bytes, as torch's grouped product wants them."""
    return all(size * weights.element_size() % 16 == 0 for size in weights.shape[1:])


def looped_products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return `expert_products`, one product after another, in any number type. The host reads the sizes."""
    parts = [F.linear(part, weight) for part, weight in zip(_by_expert(rows, ends), weights, strict=True)]
    return torch.cat(parts)


def expert_weight_gradients(weight: Tensor, count: int, grad_output: Tensor, inputs: Tensor, ends: Tensor) -> Tensor:
    """Return what to give autograd as the gradient of the matrices of `count` experts, one below the other.

    Each is grad_output^T @ inputs over the expert's rows. Where the weight has a gradient buffer, the products are
    added there and the returned tensor has undefined content (sft.kernels.gradient_buffer).
    """
    buffer = buffer_of(weight)
    if buffer is None:
        return _gradients(weight.view(count, -1, weight.size(1)), grad_output, inputs, ends).view_as(weight)
    _add_by_expert(buffer.values.view(count, -1, weight.size(1)), grad_output, inputs, ends, overwrite=buffer.is_empty)
    return buffer.answer()


def _gradients(weights: Tensor, grad_output: Tensor, inputs: Tensor, ends: Tensor) -> Tensor:
    """Return the gradients of weights [experts, rows, columns], of zeros where an expert has no rows."""
    values = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    _add_by_expert(values, grad_output, inputs, ends, overwrite=True)
    return values


def _add_by_expert(out: Tensor, grad_output: Tensor, inputs: Tensor, ends: Tensor, *, overwrite: bool) -> None:
    """Add to out [experts, rows, columns], which holds zeros where `overwrite` is set."""
    if out.is_cuda and grad_output.dtype == torch.bfloat16:
        from sft.kernels.triton import experts as triton_experts  # installed with CUDA builds of torch only

        triton_experts.add_weight_gradients(out, grad_output, inputs, ends, overwrite=overwrite)
        return
    put = set_product if overwrite else add_product
    for own, grads, rows in zip(out, _by_expert(grad_output, ends), _by_expert(inputs, ends), strict=True):
        put(own, grads.t(), rows)


def _by_expert(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    bounds = [0, *ends.tolist()]
    return torch.split(rows, [end - begin for begin, end in itertools.pairwise(bounds)])


class _Products(torch.autograd.Function):
    """All experts' products. On some GPUs torch's own backward pass gives experts without rows gradients of noise."""

    @staticmethod
    def forward(ctx: Context, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        return _product(rows, weights, ends)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows_grad = _product(grad, weights.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        weights_grad = _gradients(weights, grad, rows.contiguous(), ends) if ctx.needs_input_grad[1] else None
        return rows_grad, weights_grad, None


class _Context(Context, Protocol):
    assignment: Assignment


class _ToExperts(torch.autograd.Function):
    """A gather whose backward pass gathers, too: indexing's own would add up with atomic additions."""

    @staticmethod
    def forward(ctx: _Context, tokens: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return _gather(tokens, assignment)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.assignment), None


class _SumOfExperts(torch.autograd.Function):
    """The transpose of `_ToExperts`."""

    @staticmethod
    def forward(ctx: _Context, rows: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return _sum(rows, assignment)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.assignment), None


def _gather(tokens: Tensor, assignment: Assignment) -> Tensor:
    return tokens.index_select(0, assignment.source // assignment.chosen)


def _sum(rows: Tensor, assignment: Assignment) -> Tensor:
    if rows.is_cuda:
        from sft.kernels.triton import experts as triton_experts

        return triton_experts.sum_rows(rows, assignment.place, assignment.chosen)
    by_token = rows.index_select(0, assignment.place).view(-1, assignment.chosen, rows.size(-1))
    return by_token.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


class _Order(Context, Protocol):
    inverse: Tensor


class _Permute(torch.autograd.Function):
    """A permutation of rows, backward by its inverse."""

    @staticmethod
    def forward(ctx: _Order, values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx: _Order, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse), None, None


def wide(values: Tensor) -> Tensor:
    """Return values in fp32, or in the wider type that they have."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
