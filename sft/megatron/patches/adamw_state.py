"""Checkpoints of a distributed optimizer over torch's AdamW, which is used without Transformer Engine and Apex."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sft.megatron.patches.patch import Patch


def prime_states(optimizer: MegatronOptimizer) -> None:
    """Give a never stepped distributed optimizer the empty AdamW states that loading expects."""
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param] = {
                        "step": torch.zeros((), device=param.device),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter its own `step` tensor after a load, on the device where the fused AdamW looks for it."""
    for inner in _torch_optimizers(optimizer):
        for param, state in inner.state.items():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"]).to(device=param.device, dtype=torch.float32, copy=True)


def _torch_optimizers(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield part.optimizer


def _copy_main_param_and_states(
    self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    """Copy loaded tensors into the main parameter and its states. `step` comes with the parameter groups."""
    group_index, group_order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group_index]["params"][group_order]
    main_param.data.copy_(tensors["param"])
    for name, state in self.optimizer.state[main_param].items():
        if name != "step":
            state.copy_(tensors[name])


def _apply() -> None:
    DistributedOptimizer._set_main_param_and_optimizer_states = _copy_main_param_and_states


PATCH = Patch(
    name="adamw_state",
    why="loading fails: an optimizer that has not stepped has no states, and AdamW's `step` is not among those saved. "
    "Afterwards all parameters share one `step` tensor, which AdamW increments once for each: its bias correction is "
    "wrong, without an error",
    targets=("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",),
    test="parity/test_silent_wrong.py::test_s3_shared_steps_would_be_wrong",
    apply=_apply,
)
