"""How the experts of a step were used: numbers for the log, made on the device from what routers have recorded.

Every rank gets the same numbers. They cost a few small reductions in steps that are logged, and nothing in others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.contract.topology import Topology
from sft.megatron.core import GPTModel, parallel_state
from sft.megatron.layers.router import routers_of
from sft.models.architecture import Architecture, Experts

AUX_LOSS = "router/aux_loss"
NUMBERS = (
    "router/expert_load",
    "router/rank_load",
    "router/entropy",
    "router/dead_experts",
    "router/max_logit",
    AUX_LOSS,
)
"""Names of the numbers, in their order."""


def routing_numbers(
    model_chunks: Sequence[GPTModel],
    architecture: Architecture,
    topology: Topology,
    examples: int,
    device: torch.device,
) -> Tensor:
    """Return NUMBERS of the step that is over, fp64 [6], from the routers of all ranks. Every rank must call this."""
    layers = [index for index, layer in enumerate(architecture.layers) if isinstance(layer.mlp, Experts)]
    experts = architecture.layers[layers[0]].mlp
    assert isinstance(experts, Experts)
    sums = torch.zeros(len(layers), experts.count + 2, dtype=torch.float64, device=device)
    peak = torch.full((), -torch.inf, device=device)
    for model_chunk in model_chunks:
        for layer, router in routers_of(model_chunk).items():
            sums[layers.index(layer)], own_peak = router.record.take(device)
            peak = torch.maximum(peak, own_peak)
    for group in _groups(topology):
        dist.all_reduce(sums, group=group)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    load, (entropy, loss) = sums[:, : experts.count], sums[:, experts.count :].unbind(1)
    tokens = load.sum() / experts.chosen
    owners = parallel_state.get_expert_model_parallel_world_size()
    by_rank = load.view(len(layers), owners, -1).sum(-1)
    numbers = [
        _unevenness(load),
        _unevenness(by_rank),
        entropy.sum() / tokens / math.log(experts.count),
        (load == 0).sum().double(),
        peak.double(),
        loss.sum() / (max(examples, 1) * len(layers)),
    ]
    return torch.stack(numbers)


def _unevenness(load: Tensor) -> Tensor:
    """Return the largest load over the mean, of the layer where it is most, from [layers, experts or ranks]."""
    return (load.amax(1) / load.mean(1).clamp_min(1e-9)).max()


def _groups(topology: Topology) -> list[dist.ProcessGroup]:
    """Return the groups whose ranks have other tokens or other layers. Tensor parallel ranks may have the same ones."""
    groups = [
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ]
    if topology.sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    return [group for group in groups if group.size() > 1]
