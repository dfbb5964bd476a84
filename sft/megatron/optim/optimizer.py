"""Megatron-core's AdamW (master weights, sharding, clipping), with the interface that Lightning expects.

The step never waits for the device: norm, clipping and the check of the step are tensors. Torch's fused AdamW itself
skips a bad step by the flag of mixed precision scalers (`found_inf`), and leaves weights, moments and step count alone.
Rejected: Megatron-core's own step, which fetches the gradient norm to the host and can refuse a step only there; and
multiplying gradients by 0, since 0 * NaN is NaN and AdamW changes weights for a gradient of 0, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.contract.spec import OptimizerSpec
from sft.megatron.core import (
    DistributedDataParallel,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from sft.megatron.optim.multipliers import Multipliers, overrides_of
from sft.megatron.parallel.groups import sum_over
from sft.megatron.patches.gradient_norm import total_norm
from sft.megatron.patches.master_step import use_one_pass


def build_optimizer(
    spec: OptimizerSpec,
    model_chunks: Sequence[DistributedDataParallel],
    dtype: torch.dtype,
    multipliers: Multipliers,
    *,
    one_pass: bool,
) -> MegatronOptimizer:
    """Return Megatron-core's optimizer of wrapped chunks. With `one_pass` one kernel updates all weights.

    `multipliers` are those of parameters whose learning rate is a multiple of the others'.
    """
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
        overlap_param_gather=any(model_chunk.ddp_config.overlap_param_gather for model_chunk in model_chunks),
    )
    optimizer = get_megatron_optimizer(config, list(model_chunks), overrides_of(config, multipliers))
    # Where experts alone are adapted there is one for all other weights, of which there are none: it cannot be saved.
    optimizer.chained_optimizers = [part for part in optimizer_parts(optimizer) if part.optimizer is not None]
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            group.update(fused=True, foreach=False)  # only the fused one skips a step on the device
    if one_pass:
        for part in optimizer_parts(optimizer):
            use_one_pass(part)
    return optimizer


StepCheck = Callable[[Tensor, Tensor], Tensor]
"""Takes loss and gradient norm, and returns 1.0 for a bad step, else 0.0; all on the device."""


@torch.no_grad()
def guarded_step(optimizer: MegatronOptimizer, loss: Tensor, check: StepCheck) -> tuple[Tensor, Tensor]:
    """Clip, and step unless `check` finds the step bad. Return the norm before clipping, and the result."""
    parts = optimizer_parts(optimizer)
    optimizer.prepare_grads()
    norm = _gradient_norm(parts, loss.device)
    bad = check(loss, norm)
    for part in parts:
        grads = [param.grad for param in part.get_parameters() if param.grad is not None]
        if not grads or part.config.clip_grad == math.inf:
            continue
        if grads[0].is_cuda:  # AdamW's kernel divides by this factor: saves a pass over the gradients
            part.optimizer.grad_scale = ((norm + 1e-6) / part.config.clip_grad).clamp(min=1.0).float()
        else:
            factor = (part.config.clip_grad / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, factor.to(grads[0].dtype))
    for inner in torch_optimizers(optimizer):
        inner.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step_with_ready_grads()
    return norm, bad


def _gradient_norm(parts: Sequence[MegatronOptimizer], device: torch.device) -> Tensor:
    """Return the global gradient norm in fp64, on every rank and on the device. Each parameter counts once.

    Experts are in an optimizer of their own, whose ranks differ from those of other parameters' unless both are
    distributed over all ranks.
    """
    by_group: dict[dist.ProcessGroup, list[Tensor]] = {}
    for part in parts:
        by_group.setdefault(part.get_grad_stats_parallel_group(), []).extend(_counted_grads(part))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group, grads in by_group.items():
        norm = total_norm(grads) if grads else torch.zeros((), device=device)
        squared = norm.double().square()
        sum_over(squared, group)
        total += squared
    return total.sqrt()


def _counted_grads(part: MegatronOptimizer) -> list[Tensor]:
    """Return the gradients that count towards the norm on this rank, by the method's name before or since 0.19."""
    renamed = hasattr(part, "get_grads_for_grad_norm")
    grads: list[Tensor] = part.get_grads_for_grad_norm() if renamed else part.get_main_grads_for_grad_norm()
    return grads


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers that make up a chained one, as of experts and of the rest, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers of torch that hold this rank's master weights and their states."""
    return [part.optimizer for part in optimizer_parts(optimizer) if part.optimizer is not None]


class LightningOptimizerShell(torch.optim.Optimizer):
    """Stands for the Megatron-core optimizer in Lightning.

    Its parameter is a dummy; its groups are those of the real optimizer, not copies. `state_dict` is empty, since the
    state is in the sharded checkpoint.
    """

    def __init__(self, inner: MegatronOptimizer, check: StepCheck) -> None:
        self.inner = inner
        self.loss: Tensor
        """Loss of the next step; the module sets it."""
        self.grad_norm: Tensor
        """Global gradient norm before clipping, of the last step."""
        self.bad: Tensor
        """1.0 if the last step was not applied, else 0.0."""
        self._check = check
        super().__init__([torch.zeros(1)], {})

    @property
    def param_groups(self) -> list[dict[str, object]]:
        groups: list[dict[str, object]] = self.inner.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, object]]) -> None:
        pass  # set by the base class's constructor; the real groups stay

    def add_param_group(self, param_group: dict[str, object]) -> None:
        pass

    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        self.grad_norm, self.bad = guarded_step(self.inner, self.loss, self._check)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        pass
