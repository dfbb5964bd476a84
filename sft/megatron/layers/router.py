"""Choose the experts of each token.

In fp32 and once a token, whatever the precision of the run. A bias by which some families keep their experts equally
busy takes part in the choice and not in the weights; it is not trained here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.megatron.core import GPTModel, TransformerConfig
from sft.megatron.layers.load_balance import RoutingRecord, with_balance_loss
from sft.megatron.parallel.documents import Documents, Rows
from sft.models.architecture import Experts

_TINY = 1e-20
"""Keeps the sum of sigmoid scores above 0. Beside a sum of probabilities it is lost in rounding."""


class Router(nn.Module):
    """Chooses the experts of each token."""

    def __init__(self, config: TransformerConfig, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts.count, config.hidden_size, dtype=config.params_dtype))
        # Each rank then routes its own part of the sequence, and has a partial gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.logit_bias: nn.Parameter | None = None
        if experts.router_bias:
            self.logit_bias = nn.Parameter(torch.empty(experts.count, dtype=config.params_dtype))
            self.logit_bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.scale: nn.Parameter | None = None
        self.expert_scale: nn.Parameter | None = None
        if experts.scaled_router:
            self._epsilon: float = config.layernorm_epsilon
            self.scale, self.expert_scale = (
                nn.Parameter(torch.empty(size, dtype=config.params_dtype))
                for size in (config.hidden_size, experts.count)
            )
            for parameter in (self.scale, self.expert_scale):
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias: Tensor | None
        # In fp32 always: its steps are smaller than what bf16 can tell apart at its size.
        self.register_buffer("bias", torch.zeros(experts.count) if experts.selection_bias else None)
        self.record = RoutingRecord(experts)
        self.documents: Documents | None = None
        """Those of the tokens that come next; set before each pass through the layer (`tell_documents`)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's weights in fp32 and its experts, both [..., chosen]."""
        bias = None if self.logit_bias is None else self.logit_bias.float()
        logits = F.linear(self._scaled(tokens.float()), self.weight.float(), bias)
        scores = logits.sigmoid() if self.experts.scores == "sigmoid" else torch.softmax(logits, dim=-1)
        chosen = choose(scores.detach(), self.bias, self.experts)
        weights = scores.gather(-1, chosen)
        if self.experts.normalized:
            weights = weights / self._divisor(weights.sum(-1, keepdim=True))
        if self.experts.scaling != 1.0:
            weights = weights * self.experts.scaling
        if self.expert_scale is not None:
            weights = weights * self.expert_scale.float()[chosen]
        # A layer that is recomputed comes here twice, the first time without gradients.
        if self.documents is None or not (self.training and torch.is_grad_enabled()):
            return weights, chosen
        weights, loss = with_balance_loss(weights, scores, chosen, self.documents, self.experts)
        if self.documents.step.recorded:
            self.record.add(logits.detach(), scores.detach(), chosen, self.documents, loss)
        return weights, chosen

    def _scaled(self, tokens: Tensor) -> Tensor:
        if self.scale is None:
            return tokens
        hidden = tokens.size(-1)
        normed: Tensor = F.rms_norm(tokens, (hidden,), eps=self._epsilon)
        return normed * self.scale.float() * float(hidden**-0.5)

    def _divisor(self, total: Tensor) -> Tensor:
        bound = self.experts.smallest_sum
        return total + _TINY if bound is None else total.clamp(min=bound)


def choose(scores: Tensor, bias: Tensor | None, experts: Experts) -> Tensor:
    """Return the experts of each token, [..., chosen], from its scores, [..., experts]."""
    preferred = scores if bias is None else scores + bias
    if experts.chosen_groups < experts.groups:
        by_group = preferred.view(*preferred.shape[:-1], experts.groups, -1)
        best = by_group.topk(experts.best_of_group, dim=-1).values.sum(-1).topk(experts.chosen_groups, dim=-1).indices
        is_open = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, True)
        preferred = by_group.masked_fill(~is_open.unsqueeze(-1), float("-inf")).flatten(-2)
    return preferred.topk(experts.chosen, dim=-1).indices


def routers_of(model_chunk: GPTModel) -> dict[int, Router]:
    """Return the routers of a chunk by their layers, counted from 0 in the whole model."""
    found = {layer.layer_number - 1: getattr(layer.mlp, "router", None) for layer in model_chunk.decoder.layers}
    return {number: router for number, router in found.items() if router is not None}


def tell_documents(model_chunk: GPTModel) -> None:
    """Let the routers of a chunk know of which documents the tokens are, at each pass through their layers.

    By the layer's own arguments, since a recomputed layer gets those of its micro-batch again when others have been
    through it in between.
    """
    routers = routers_of(model_chunk)
    for layer in model_chunk.decoder.layers:
        if layer.layer_number - 1 in routers:
            hook = partial(_take_documents, routers[layer.layer_number - 1])
            layer.register_forward_pre_hook(hook, with_kwargs=True)


def _take_documents(router: Router, _: nn.Module, __: object, arguments: Mapping[str, object]) -> None:
    rows = arguments.get("packed_seq_params")
    router.documents = rows.documents if isinstance(rows, Rows) else None
