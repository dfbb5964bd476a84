"""What one rank has to keep so that it can go on, bit by bit, under the same layout: the content of a copy in memory.

That is its share of the master weights and of AdamW's states, random generators and Lightning's counters. Weights are
left out: they are master weights, rounded and gathered, so the distributed optimizer's shares are all there is. Frozen
weights and buffers are read from `model.path` again, as on a resume. A schedule's state is the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from launcher.contract.errors import CheckpointError
from sft.checkpoint.load import RngStates, restore_rng, rng_states
from sft.megatron.optim.optimizer import optimizer_parts, torch_optimizers

if TYPE_CHECKING:
    from sft.engine.module import SFTGPT

_MASTER = "master"
_TENSORS_OF_A_MASTER = 3
"""The weight itself and AdamW's two moments."""
_OF_A_MASTER = 4096
"""Bytes in which the file's headers and the step count of a master weight have room."""
_OTHER = 1 << 20
"""Bytes in which random generators and counters have room."""


class RankState(TypedDict):
    """The content of a rank's copy: tensors, and plain values that torch.load reads with weights_only."""

    masters: list[dict[str, Tensor]]
    """Of each master weight in the optimizer's order: itself and AdamW's states."""
    rng: RngStates
    base_weights: list[str]
    """Of each model chunk with adapters: what identifies the weights that they were trained on."""
    lightning: str
    """Lightning's counters, as JSON."""


def rank_state(module: SFTGPT, counters: Mapping[str, object]) -> RankState:
    """Return what this rank must keep. Most tensors are the optimizer's own, on its device: torch.save moves each."""
    states = (inner.state for inner in torch_optimizers(module.megatron_optimizer))
    by_master = {master: values for state in states for master, values in state.items()}
    return {
        "masters": [
            {_MASTER: _alone(master)} | {name: _alone(value) for name, value in by_master.get(master, {}).items()}
            for master in _masters(module)
        ],
        "rng": rng_states(),
        "base_weights": _base_weights(module),
        "lightning": json.dumps(counters),
    }


def expected_bytes(module: SFTGPT) -> int:
    """Return about how many bytes `rank_state` will have once there are AdamW's states, and never fewer."""
    masters = [master.numel() * master.element_size() for master in _masters(module)]
    return sum(masters) * _TENSORS_OF_A_MASTER + len(masters) * _OF_A_MASTER + _OTHER


@torch.no_grad()
def restore(module: SFTGPT, state: RankState) -> dict[str, object]:
    """Fill model, optimizer and random generators, and return Lightning's counters. All ranks call it together."""
    if state["base_weights"] != _base_weights(module):
        raise CheckpointError("the copy's adapters were trained on other weights than those in model.path")
    optimizers = torch_optimizers(module.megatron_optimizer)
    owners = {master: inner for inner in optimizers for group in inner.param_groups for master in group["params"]}
    for master, saved in zip(_masters(module), state["masters"], strict=True):
        _fill(master, saved.pop(_MASTER))
        if saved:
            owners[master].state[master] = {name: value.to(master.device, copy=True) for name, value in saved.items()}
    for part in optimizer_parts(module.megatron_optimizer):
        # The class's own: with a kernel that writes the weights beside the masters, the optimizer's does nothing.
        round_masters = getattr(type(part), "_copy_main_params_to_model_params", None)
        if round_masters is not None and part.optimizer is not None:
            round_masters(part)
    for model_chunk in module.model_chunks:
        if model_chunk.ddp_config.use_distributed_optimizer:
            model_chunk.start_param_sync(force_sync=True)
    restore_rng(state["rng"])
    counters: dict[str, object] = json.loads(state["lightning"])
    return counters


def _masters(module: SFTGPT) -> Iterator[Tensor]:
    for inner in torch_optimizers(module.megatron_optimizer):
        for group in inner.param_groups:
            yield from group["params"]


def _base_weights(module: SFTGPT) -> list[str]:
    return [str(model_chunk.module.base_weights) for model_chunk in module.model_chunks]


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor without the rest of its storage, which torch.save would write as well: shares may be views."""
    own = tensor.detach()
    if own.untyped_storage().nbytes() == own.numel() * own.element_size():
        return own
    return own.cpu() if own.is_cuda else own.clone()


def _fill(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        had, has = (f"{list(each.shape)} {each.dtype}" for each in (value, tensor))
        raise CheckpointError(f"the copy has a tensor of {had} where this rank has {has}")
    tensor.data.copy_(value)
