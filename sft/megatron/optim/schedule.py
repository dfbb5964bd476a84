"""The learning rate of each step: Megatron-core's scheduler, and the schedules that it lacks.

A linear warm-up, then the shape of `train.optimizer.schedule` down to `min_lr`. Step k, counted from 0, uses the
schedule's value for k. Parameters with a multiplier (sft.megatron.optim.multipliers) use that multiple of it.
"""

from __future__ import annotations

import math

from launcher.contract.errors import ConfigError
from launcher.contract.spec import OptimizerSpec
from launcher.contract.steps import schedule_problems, share_of_steps, warmup_of
from sft.megatron.core import MegatronOptimizer, OptimizerParamScheduler

_WSD_SHARE = 0.1
_MEGATRON_STYLES = {"wsd": "WSD", "inverse_sqrt": "inverse-square-root"}
_OWN_STYLES = ("polynomial", "cosine_with_restarts")
_WSD_STYLES = {"cosine": "cosine", "linear": "linear", "1-sqrt": "minus_sqrt"}


class Schedule(OptimizerParamScheduler):  # type: ignore[misc]
    """Megatron-core's scheduler with one schedule for all parameters, and two more shapes."""

    rate: float
    """The learning rate of the current step, of parameters without a multiplier."""

    def __init__(self, spec: OptimizerSpec, optimizer: MegatronOptimizer, max_steps: int) -> None:
        self._spec = spec
        problems = [f"{key}: {text}" for key, text in schedule_problems(spec, max_steps)]
        if problems:
            raise ConfigError(problems)
        warmup = warmup_of(spec, max_steps)
        end = max(spec.decay_steps or max_steps, warmup + 1)
        super().__init__(
            optimizer,
            init_lr=spec.initial_lr,
            max_lr=spec.lr,
            min_lr=spec.lr if spec.schedule == "constant" else spec.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=end,
            lr_decay_style=_MEGATRON_STYLES.get(spec.schedule, spec.schedule),
            start_wd=spec.weight_decay,
            end_wd=spec.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,  # the config decides, also where it was changed on resubmit
            wsd_decay_steps=min(spec.wsd_steps or share_of_steps(_WSD_SHARE, max_steps), end - warmup),
            lr_wsd_decay_style=_WSD_STYLES[spec.wsd_decay or "cosine"],
        )

    def step(self, increment: int) -> None:
        """Set the learning rate and weight decay of all groups."""
        self.num_steps += increment
        self.rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get("multiplier", 1.0)
            group["weight_decay"] = self._spec.weight_decay * group.get("wd_mult", 1.0)

    def _rate(self) -> float:
        """Return the rate of the current step."""
        warming = self.lr_warmup_steps > 0 and self.num_steps <= self.lr_warmup_steps
        if warming or self.lr_decay_style not in _OWN_STYLES:
            return float(self.get_lr({}))
        done = (self.num_steps - self.lr_warmup_steps) / (self.lr_decay_steps - self.lr_warmup_steps)
        left = 0.0
        if done < 1 and self.lr_decay_style == "polynomial":
            left = (1 - done) ** (self._spec.power or 1.0)
        elif done < 1:
            left = 0.5 * (1 + math.cos(math.pi * ((self._spec.cycles or 1) * done % 1.0)))
        return float(self.min_lr + left * (self.max_lr - self.min_lr))
