"""How equally a router uses its experts: a loss that evens them out, where it is asked for, and numbers for the log.

The loss of a document d of T tokens in one layer, with E experts of which k are chosen for a token, is

    E / (k T^2) * sum over experts e of n_e * p_e

where n_e is the number of its tokens that go to e and p_e the sum of the router's probabilities of e over them. It is 1
where both are the same for all experts. A document's loss depends on no other one, so that the mean over the documents
of a global batch, added up over layers, is the same under every layout, micro-batch size and packing.

Gradients reach p alone. With n fixed the loss is a sum over tokens, and no rank needs the probabilities of another.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sft.kernels.autograd import Context
from sft.megatron.core import parallel_state
from sft.megatron.parallel.documents import Documents
from sft.models.architecture import Experts


def with_balance_loss(
    weights: Tensor, scores: Tensor, chosen: Tensor, documents: Documents, experts: Experts
) -> tuple[Tensor, Tensor]:
    """Return `weights`, whose backward pass adds the gradients of the loss, and this rank's part of the loss.

    The loss is the sum over documents. Where the step has none, the weights stay as they are and it is 0.
    """
    if documents.step.aux_scale == 0:
        return weights, torch.zeros((), device=weights.device)
    probabilities = _probabilities(scores, experts)
    loss = (probabilities * _factors(chosen.flatten(0, -2), documents, experts)).sum()
    joined: Tensor = _WithLoss.apply(weights, loss, documents.step.aux_scale)  # type: ignore[no-untyped-call]
    return joined, loss.detach()


def _probabilities(scores: Tensor, experts: Experts) -> Tensor:
    """Return the router's probabilities of all experts, [tokens, experts]."""
    scores = scores.flatten(0, -2)
    return scores if experts.scores == "softmax" else scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


@torch.no_grad()
def _factors(chosen: Tensor, documents: Documents, experts: Experts) -> Tensor:
    """Return what each probability is multiplied by, E n_e / (k T^2) or 0 for padding, [tokens, experts]."""
    size = (documents.lengths.numel(), experts.count)
    places = (documents.numbers[:, None] * experts.count + chosen).flatten()
    counts = torch.zeros(size, dtype=torch.int32, device=chosen.device)
    # Whole numbers: their sum is the same in any order.
    counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
    for group in _sharing_groups(documents):
        dist.all_reduce(counts, group=group)
    lengths = documents.lengths.float().square() * experts.chosen
    by_document = counts.float() * experts.count / lengths.clamp_min(1.0)[:, None]
    by_document[0] = 0.0
    return by_document[documents.numbers]


def _sharing_groups(documents: Documents) -> list[dist.ProcessGroup]:
    """Return the groups whose ranks route parts of the same documents."""
    groups = [parallel_state.get_context_parallel_group()]
    if documents.step.sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    return [group for group in groups if group.size() > 1]


class _Context(Context, Protocol):
    scale: float


class _WithLoss(torch.autograd.Function):
    """Hands on the weights; backward, the loss gets `scale` as its gradient."""

    @staticmethod
    def forward(ctx: _Context, weights: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, grad.new_full((), ctx.scale), None


class RoutingRecord:
    """Adds up, on the device, what a router does in a step."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self._sums: Tensor | None = None
        self._peak: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, scores: Tensor, chosen: Tensor, documents: Documents, loss: Tensor) -> None:
        """Add one pass. Padding does not count."""
        count, real = self._experts.count, documents.numbers > 0
        if self._sums is None or self._peak is None:
            self._sums, self._peak = self.nothing(logits.device)
        # In fp64 whole numbers are exact, and their sum the same in any order.
        wanted = chosen.flatten(0, -2)
        self._sums[:count].index_add_(0, wanted.flatten(), real[:, None].expand_as(wanted).flatten().double())
        entropy = torch.special.entr(_probabilities(scores, self._experts)).sum(-1)
        self._sums[count] += torch.where(real, entropy, 0.0).sum()
        self._sums[count + 1] += loss
        highest = logits.flatten(0, -2).amax(-1)
        self._peak = torch.maximum(self._peak, torch.where(real, highest, -torch.inf).max())

    def take(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the fp64 sums (tokens of each expert, entropies, losses) and the highest logit, and begin anew."""
        sums, peak = self._sums, self._peak
        self._sums = self._peak = None
        return self.nothing(device) if sums is None or peak is None else (sums, peak)

    def nothing(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what there is before the first pass."""
        sums = torch.zeros(self._experts.count + 2, dtype=torch.float64, device=device)
        return sums, torch.full((), -torch.inf, device=device)
