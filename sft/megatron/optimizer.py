"""AdamW by Megatron-core (master weights, sharding, clipping) with the face that Lightning expects.

The schedule is Megatron-core's too: linear warm-up from 0, then cosine, linear or no decay to `min_lr` at the last
step. Step k (from 0) runs at the schedule's value for k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from launcher.spec import OptimizerSpec
from sft.megatron.mcore import (
    DistributedDataParallel,
    MegatronOptimizer,
    OptimizerConfig,
    OptimizerParamScheduler,
    get_megatron_optimizer,
)


def build_optimizer(
    spec: OptimizerSpec, chunks: Sequence[DistributedDataParallel], dtype: torch.dtype
) -> MegatronOptimizer:
    """Megatron-core's optimizer over the wrapped chunks."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=spec.lr,
        min_lr=spec.min_lr,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.beta1,
        adam_beta2=spec.beta2,
        adam_eps=spec.eps,
        # An infinite bound never clips, yet the norm is computed and logged.
        clip_grad=spec.clip_grad if spec.clip_grad > 0 else math.inf,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=spec.distributed,
    )
    return get_megatron_optimizer(config, list(chunks))


def build_scheduler(spec: OptimizerSpec, optimizer: MegatronOptimizer, max_steps: int) -> OptimizerParamScheduler:
    """The learning rate schedule over `max_steps` optimizer steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=spec.lr,
        min_lr=spec.lr if spec.schedule == "constant" else spec.min_lr,
        lr_warmup_steps=spec.warmup_steps,
        lr_decay_steps=max(max_steps, spec.warmup_steps + 1),
        lr_decay_style=spec.schedule,
        start_wd=spec.weight_decay,
        end_wd=spec.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the resolved config is the truth, also when it was changed on resubmit
    )


class LightningOptimizerShell(torch.optim.Optimizer):
    """What Lightning holds in place of the Megatron-core optimizer.

    Its parameter is a dummy; its groups are the live groups of the real one. State travels in the sharded
    checkpoint, so `state_dict` is empty.
    """

    def __init__(self, inner: MegatronOptimizer) -> None:
        self.inner = inner
        self.grad_norm: float = math.nan
        """Global gradient norm before clipping, of the last step."""
        super().__init__([torch.zeros(1)], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        pass  # set by the base class's constructor; the real groups stay

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        pass

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        _, self.grad_norm, _ = self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
