"""LM head and cross-entropy in one operation that never holds all logits.

With a vocabulary of 128,000 the bf16 logits of 4,096 tokens are 1 GiB, and each fp32 copy of them is 2 GiB. The caller
passes only positions that are trained, and this takes them in blocks of rows. The loss is a weighted sum, so the
gradient of a position is known as soon as its logits are: forward overwrites each block of logits with their gradient,
multiplies it into the gradients of hidden states and weight, and frees it. Backward only scales.

Where the weight has an fp32 gradient buffer (sft.kernels.gradient_buffer), forward adds to it directly: a gradient of
its own would be as large (1.5 GiB in a 3B model) and cost another pass over both. Then the sum itself must be what is
differentiated, not a multiple of it; backward asserts that.

Under tensor parallelism each rank has some rows of the vocabulary. The ranks exchange maximum, sum and the label's
logit of each position, which gives the exact loss. The gradient of the hidden states is then this rank's part of a
sum: Megatron-core's mapping that gathered or copied the hidden states adds the parts in its backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sft.kernels.autograd import Context
from sft.kernels.gradient_buffer import buffer_of
from sft.kernels.loss_form import PLAIN, LossForm
from sft.kernels.products import add_product, set_product

BLOCK_BYTES = 2 << 30
"""Size of a block of logits: enough rows that the matrix products run at full speed."""


@dataclass(frozen=True, slots=True)
class VocabPart:
    """This rank's part of the vocabulary."""

    first: int = 0
    """Token id of its first row."""
    width: int = 0
    """Rows that are tokens; any rows after them are padding."""
    group: dist.ProcessGroup | None = None
    """The tensor parallel ranks; None where this rank has the whole vocabulary."""
    tied: bool = False
    """Whether the weight is the embedding too. Its lookup, which comes later in backward, then returns the tensor that
    autograd needs for the weight (sft.kernels.gradient_buffer)."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    part: VocabPart,
    form: LossForm = PLAIN,
) -> Tensor:
    """Return sum(loss_weights * cross-entropy) over n positions, an fp32 scalar.

    hidden [n, h]; weight [rows, h], this rank's part; labels [n], token ids of the whole vocabulary; loss_weights [n],
    fp32. With a `softcap` c the logits are c * tanh(hidden weight^T / c). Where gradients are disabled, none are
    computed.
    """
    # Asked here: inside a torch.autograd.Function gradients are always disabled.
    keep_gradients = torch.is_grad_enabled()
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, loss_weights, part, form, keep_gradients)
    return total


class _LossContext(Context, Protocol):
    weight_grad: _WeightGradient | None
    tied: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LossContext,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        part: VocabPart,
        form: LossForm,
        grads: bool,
    ) -> Tensor:
        hidden_grad = torch.empty_like(hidden) if grads and ctx.needs_input_grad[0] else None
        weight_grad = _WeightGradient(weight) if grads and ctx.needs_input_grad[1] else None
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        size = max(BLOCK_BYTES // (weight.shape[0] * weight.element_size()), 1)
        size = min(size, -(-len(hidden) // 2))  # two blocks at least: small micro-batches are meant to save memory
        for first in range(0, len(hidden), max(size, 1)):
            rows = slice(first, first + size)
            logits = hidden[rows] @ weight.t()
            own = labels[rows] - part.first
            losses[rows], log_sum = _losses(logits, own, part, form)
            if hidden_grad is None and weight_grad is None:
                continue
            grad = _gradient_in_place(logits, own, log_sum, loss_weights[rows], part.width, form)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad.add(grad, hidden[rows])
            del logits, grad  # both names, or this block is still in memory when the next is made
        ctx.save_for_backward(hidden_grad)
        ctx.weight_grad, ctx.tied = weight_grad, part.tied
        return torch.dot(losses, loss_weights)

    @staticmethod
    def backward(ctx: _LossContext, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad: Tensor | None
        (hidden_grad,) = ctx.saved_tensors
        weight_grad, ctx.weight_grad = ctx.weight_grad, None  # else the graph would keep its memory
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad.finish(scale, tied=ctx.tied),
            *(None,) * 5,
        )


class _WeightGradient:
    """Sum of the weight's gradient over blocks, in the weight's own buffer if that is fp32, else in new memory."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._buffer = buffer_of(weight)
        self._direct = self._buffer is not None and self._buffer.values.dtype == torch.float32
        self._sum: Tensor | None = None
        """The sum in new memory; None before the first block."""

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        """Add grad^T @ hidden, where grad is [n, rows] and hidden [n, h]."""
        if self._direct and self._buffer is not None:
            self._buffer.add_product(grad.t(), hidden)
        elif self._sum is None:
            self._sum = self._weight.new_empty(self._weight.shape, dtype=torch.float32)
            set_product(self._sum, grad.t(), hidden)
        else:
            add_product(self._sum, grad.t(), hidden)

    def finish(self, scale: Tensor, *, tied: bool) -> Tensor | None:
        """Return what autograd gets as the weight's gradient (see sft.kernels.gradient_buffer), None for a tied weight.

        `scale` is the gradient of the loss. It multiplies the sum, unless that already stands in the weight's buffer.
        """
        if self._buffer is None:
            return (self._own() * scale).to(self._weight.dtype)
        if self._direct:
            # On the device, without waiting for it: `assert scale == 1` would make the host wait.
            torch._assert_async(scale == 1, "the loss was scaled after its weight gradient had been added unscaled")
        else:
            values = self._buffer.values
            torch.addcmul(values, self._own().to(values.dtype), scale.to(values.dtype), out=values)
        if not tied:
            return self._buffer.answer()
        self._buffer.mark()  # the lookup of the embedding, which comes later in backward, answers autograd
        return None

    def _own(self) -> Tensor:
        """Return the sum in new memory, zeros if no position is trained."""
        return torch.zeros_like(self._weight, dtype=torch.float32) if self._sum is None else self._sum


def _losses(logits: Tensor, labels: Tensor, part: VocabPart, form: LossForm) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the log of the sum of exponentials of each row, over the whole vocabulary."""
    peak, total, label_logit, logit_sum = _statistics(logits, labels, part.width, form.softcap)
    if part.group is not None:
        # Each rank summed exp(logit - its own maximum): bring the sums to the common maximum, then add them.
        highest = peak.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=part.group)
        sums = torch.stack([total * (peak - highest).exp(), label_logit, logit_sum])
        dist.all_reduce(sums, group=part.group)
        peak, (total, label_logit, logit_sum) = highest, sums.unbind()
    log_sum = peak + total.log()
    if form.smoothing == 0:
        return log_sum - label_logit, log_sum
    return log_sum - (1 - form.smoothing) * label_logit - form.each * logit_sum, log_sum


def _statistics(
    logits: Tensor, labels: Tensor, width: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return statistics of each row's first `width` columns, in fp32, from logits before the cap.

    They are the maximum, the sum of exp(logit - maximum), the label's logit (0 where another rank has the label), and
    the sum of the logits.
    """
    if logits.is_cuda:
        from sft.kernels.triton import cross_entropy as triton_cross_entropy

        return triton_cross_entropy.statistics(logits, labels, width, softcap)
    wide = _capped(logits[:, :width], softcap)
    # A rank may have no tokens at all, only padding; a maximum over nothing is an error.
    peak = wide.amax(dim=1) if width else wide.new_full((len(wide),), -torch.inf)
    total = (wide - peak[:, None]).exp().sum(dim=1)
    here = (labels >= 0) & (labels < width)
    picked = _capped(logits.gather(1, torch.where(here, labels, 0)[:, None])[:, 0], softcap)
    return peak, total, torch.where(here, picked, 0.0), wide.sum(dim=1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return logits after the cap, in fp32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


def _gradient_in_place(
    logits: Tensor, labels: Tensor, log_sum: Tensor, loss_weights: Tensor, width: int, form: LossForm
) -> Tensor:
    """Overwrite and return `logits`, as their gradient: loss_weight * (softmax - target) * the cap's slope.

    The target is onehot(label) or, with smoothing, what is left of it and `form.each` for all.
    """
    if logits.is_cuda:
        from sft.kernels.triton import cross_entropy as triton_cross_entropy

        return triton_cross_entropy.gradient_in_place(logits, labels, log_sum, loss_weights, width, form)
    capped = _capped(logits[:, :width], form.softcap)
    logits[:, :width] = ((capped - log_sum[:, None]).exp() - form.each).to(logits.dtype)
    logits[:, width:] = 0
    here = (labels >= 0) & (labels < width)
    row = torch.arange(len(labels), device=labels.device)[here]
    logits[row, labels[here]] -= 1 - form.smoothing
    if form.softcap is not None:
        logits[:, :width] *= (1 - (capped / form.softcap).square()).to(logits.dtype)
    return logits.mul_(loss_weights[:, None].to(logits.dtype))
