"""Checkpoints of a pipeline stage whose optimizer of experts has no parameters, since all its layers are dense."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sft.megatron.patches.patch import Patch

_PLACEHOLDER = "no parameters"

State = dict[int, dict[str, object]]


def _with_step_of_others(sharded_state: Callable[..., State]) -> Callable[..., State]:
    """Return `sharded_state` in which an optimizer without parameters has the step of those that have some."""

    @functools.wraps(sharded_state)
    def fixed(self: ChainedOptimizer, *args: object, **kwargs: object) -> State:
        parts: list[MegatronOptimizer] = self.chained_optimizers
        steps = [state["step"] for part in parts for state in part.optimizer.state.values() if "step" in state]
        empty = {index: part for index, part in enumerate(parts) if not part.get_parameters()}
        if not steps or not empty:
            return sharded_state(self, *args, **kwargs)
        step = torch.as_tensor(steps[0]).float().cpu()
        distributed = [part for part in empty.values() if isinstance(part, DistributedOptimizer)]
        for part in distributed:
            part.optimizer.state[_PLACEHOLDER] = {"step": step}
        try:
            state = sharded_state(self, *args, **kwargs)
        finally:
            for part in distributed:
                part.optimizer.state.pop(_PLACEHOLDER, None)
        for index, part in empty.items():
            if part not in distributed:
                _torch_state(state[index])["common_step"] = step
        return state

    return fixed


def _torch_state(state: dict[str, object]) -> dict[str, object]:
    """Return the states by parameter within the state of an optimizer that is not distributed, in bf16 or in fp32."""
    inner = state.get("optimizer", state)
    assert isinstance(inner, dict)
    found: dict[str, object] = inner["state"]
    return found


def _apply() -> None:
    ChainedOptimizer.sharded_state_dict = _with_step_of_others(ChainedOptimizer.sharded_state_dict)


PATCH = Patch(
    name="empty_optimizer",
    why="a stage without experts has an optimizer of experts without parameters, whose step is looked for among those "
    "of its parameters: saving fails, or a checkpoint without a step is written, with which the moments of experts are "
    "corrected as in the first step",
    targets=(
        "megatron.core.optimizer:ChainedOptimizer.sharded_state_dict",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
    ),
    test="parity/test_expert_families.py::test_a_stage_without_experts_saves_the_step_of_the_others",
    apply=_apply,
)
