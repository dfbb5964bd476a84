"""LM head and cross-entropy over the supervised positions alone, in chunks, without ever holding all logits.

The loss is a weighted sum, so that a position's gradient is known as soon as its logits are: forward turns each chunk
of logits into its gradient in place, multiplies that into the gradients of hidden states and weight, and throws it
away. Backward only scales. With 128,000 tokens of vocabulary the logits of a row of 4,096 tokens would be 1 GiB, and
their fp32 copies twice that each.

Where the weight has a gradient buffer in fp32 (`sft.kernels.weight_gradient`), forward adds to that itself: a copy of
the gradient would be as large (1.5 GiB in a 3B model) and cost a pass over both. The sum must then be what is
differentiated, and no multiple of it, which backward asserts.

Under tensor parallelism each rank has its rows of the vocabulary; maximum, sum and the label's logit are agreed on
between the passes over a chunk, which is exact. The gradient of the hidden states is then a partial sum: who gathers
or copies the hidden states before (Megatron-core's mappings) adds the parts up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sft.kernels.weight_gradient import add_product, set_product

CHUNK_BYTES = 2 << 30
"""Logits held at a time: enough rows that the products run at full speed."""


@dataclass(frozen=True, slots=True)
class VocabPart:
    """The rows of the vocabulary that this rank has."""

    first: int = 0
    """Token id of its first row."""
    width: int = 0
    """Rows that are tokens; those behind them only fill up."""
    group: dist.ProcessGroup | None = None
    """The ranks that have the others; None where this one has all."""
    tied: bool = False
    """The weight is the embedding too, and its lookup, which comes later in backward, answers autograd."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, part: VocabPart
) -> Tensor:
    """sum(loss_weights * cross-entropy), fp32, from hidden [n, h], this rank's weight [rows, h] and labels [n]."""
    keep_gradients = torch.is_grad_enabled()
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, loss_weights, part, keep_gradients)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, part: VocabPart, grads: bool
    ) -> Tensor:
        hidden_grad = torch.empty_like(hidden) if grads and ctx.needs_input_grad[0] else None
        weight_grad = _WeightGradient(weight) if grads and ctx.needs_input_grad[1] else None
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        size = max(CHUNK_BYTES // (weight.shape[0] * weight.element_size()), 1)
        size = min(size, -(-len(hidden) // 2))  # what a small micro-batch saves should not go into its logits
        for first in range(0, len(hidden), max(size, 1)):
            rows = slice(first, first + size)
            logits = hidden[rows] @ weight.t()
            own = labels[rows] - part.first
            losses[rows], log_sum = _losses(logits, own, part)
            if hidden_grad is None and weight_grad is None:
                continue
            grad = _gradient_in_place(logits, own, log_sum, loss_weights[rows], part.width)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad.add(grad, hidden[rows])
            del logits, grad  # else the next chunk finds the last one still there
        ctx.save_for_backward(hidden_grad)
        ctx.weight_grad, ctx.tied = weight_grad, part.tied
        return torch.dot(losses, loss_weights)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_grad,) = ctx.saved_tensors
        weight_grad, ctx.weight_grad = ctx.weight_grad, None
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad.finish(scale, tied=ctx.tied),
            *(None,) * 4,
        )


class _WeightGradient:
    """The weight's gradient while chunks add to it: in the weight's buffer, or else in fp32 memory of its own."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._buffer: Tensor | None = getattr(weight, "main_grad", None)
        self._direct = self._buffer is not None and self._buffer.dtype == torch.float32
        if self._direct:
            assert self._buffer is not None
            self._sum, self._empty = self._buffer, not weight.grad_added_to_main_grad  # type: ignore[attr-defined]
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        else:
            self._sum, self._empty = weight.new_empty(weight.shape, dtype=torch.float32), True

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        """Add grad^T @ hidden, from [n, rows] and [n, h]."""
        (set_product if self._empty else add_product)(self._sum, grad.t(), hidden)
        self._empty = False

    def finish(self, scale: Tensor, *, tied: bool) -> Tensor | None:
        """What autograd gets, as `weight_gradient` explains; None where the lookup gives it that."""
        if self._direct:
            torch._assert_async(scale == 1, "a loss whose weight gradients are summed as they are was scaled")
        else:
            own = torch.zeros_like(self._sum) if self._empty else self._sum  # a micro-batch without targets
            if self._buffer is None:
                return (own * scale).to(self._weight.dtype)
            torch.addcmul(self._buffer, own.to(self._buffer.dtype), scale.to(self._buffer.dtype), out=self._buffer)
            self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return None if tied else torch.empty_like(self._weight)


def _losses(logits: Tensor, labels: Tensor, part: VocabPart) -> tuple[Tensor, Tensor]:
    """(cross-entropy, log of the sum of exponentials) of each row over the whole vocabulary."""
    peak, total, label_logit = _statistics(logits, labels, part.width)
    if part.group is not None:
        highest = peak.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=part.group)
        sums = torch.stack([total * (peak - highest).exp(), label_logit])
        dist.all_reduce(sums, group=part.group)
        peak, (total, label_logit) = highest, sums.unbind()
    log_sum = peak + total.log()
    return log_sum - label_logit, log_sum


def _statistics(logits: Tensor, labels: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of exp(logit - maximum), the label's logit or 0) of each row, over `width` columns, in fp32."""
    if logits.is_cuda:
        from sft.kernels.triton import cross_entropy as triton_cross_entropy

        return triton_cross_entropy.statistics(logits, labels, width)
    wide = logits.float() if logits.dtype != torch.float64 else logits
    wide = wide[:, :width]
    peak = wide.amax(dim=1) if width else wide.new_full((len(wide),), -torch.inf)
    total = (wide - peak[:, None]).exp().sum(dim=1)
    here = (labels >= 0) & (labels < width)
    picked = logits.gather(1, torch.where(here, labels, 0)[:, None])[:, 0].to(wide.dtype)
    return peak, total, torch.where(here, picked, 0.0)


def _gradient_in_place(logits: Tensor, labels: Tensor, log_sum: Tensor, loss_weights: Tensor, width: int) -> Tensor:
    """loss_weight * (softmax - onehot(label)) in the memory of `logits`."""
    if logits.is_cuda:
        from sft.kernels.triton import cross_entropy as triton_cross_entropy

        return triton_cross_entropy.gradient_in_place(logits, labels, log_sum, loss_weights, width)
    logits[:, :width] = (logits[:, :width].to(log_sum.dtype) - log_sum[:, None]).exp().to(logits.dtype)
    logits[:, width:] = 0
    here = (labels >= 0) & (labels < width)
    row = torch.arange(len(labels), device=labels.device)[here]
    logits[row, labels[here]] -= 1
    return logits.mul_(loss_weights[:, None].to(logits.dtype))
