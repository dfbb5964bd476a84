"""Corrections of Megatron-core that CPU and GPU ranks need alike; each has a test that fails without it.

* `DistributedOptimizer` with torch's AdamW (no Transformer Engine, no Apex) cannot be checkpointed right: a never
  stepped optimizer fails an assertion on load, torch's `step` entry raises KeyError, and after a load all parameters
  share one `step` tensor, which AdamW then increments once for each parameter: bias correction is silently wrong.
* Saving synchronously starts a multiprocessing manager on every rank only to pass results to the same process: it
  re-imports `__main__`, takes seconds, and outlives the rank.

Seen in 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import queue
import types
from collections.abc import Iterator
from typing import Any

import torch


def apply(distributed_optimizer: type, filesystem_async: types.ModuleType) -> None:
    """Install the corrections that are replacements, into the class and module given."""
    distributed_optimizer._set_main_param_and_optimizer_states = _copy_main_param_and_states  # type: ignore[attr-defined]
    filesystem_async._results_queue = queue.Queue()  # type: ignore[attr-defined]


def prime_states(optimizer: Any) -> None:
    """Give a never stepped distributed optimizer the empty AdamW states that loading expects."""
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }


def unshare_steps(optimizer: Any) -> None:
    """Give each parameter a `step` of its own again after a load."""
    for inner in _torch_optimizers(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield part.optimizer


def _copy_main_param_and_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    """Copy loaded tensors into the main parameter and its states; torch's `step` is restored with the groups."""
    group_index, group_order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group_index]["params"][group_order]
    main_param.data.copy_(tensors["param"])
    for name, state in self.optimizer.state[main_param].items():
        if name != "step":
            state.copy_(tensors[name])
