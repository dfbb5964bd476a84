"""A run's length in optimizer steps, and what the schedule of the learning rate takes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from launcher.contract.spec import OptimizerSpec
from launcher.contract.spec.fields import Problem
from launcher.contract.spec.rules import shown


def share_of_steps(share: float, steps: int) -> int:
    """Return `share` x `steps`, rounded up to whole steps."""
    # Of the decimal number as written, not the nearest float: 0.07 * 100 would be a little above 7, and 8 steps.
    return math.ceil(Fraction(repr(share)) * steps)


def warmup_of(optimizer: OptimizerSpec, steps: int) -> int:
    """Return the steps of the warm-up in a run of `steps`."""
    ratio = optimizer.warmup_ratio
    return optimizer.warmup_steps if ratio is None else share_of_steps(ratio, steps)


def schedule_problems(optimizer: OptimizerSpec, steps: int) -> Iterator[Problem]:
    """Yield parts of the schedule that a run of `steps` is too short for.

    With decay_steps the schedule is as long as that, whatever the run has of it.
    """
    left = max(0, (optimizer.decay_steps or steps) - warmup_of(optimizer, steps))
    if optimizer.wsd_steps and optimizer.wsd_steps > left:
        yield (
            "train.optimizer.wsd_steps",
            f"{optimizer.wsd_steps} is more than the {left} steps after the warm-up",
        )


def warmup_remark(optimizer: OptimizerSpec, steps: int) -> str | None:
    """Return what to say of a warm-up that is longer than a run of `steps`, or None.

    It is not refused: a few steps of a config are a usual trial, and its schedule is followed as far as they go.
    """
    warmup = warmup_of(optimizer, steps)
    if warmup <= steps or optimizer.decay_steps is not None:
        return None
    last = optimizer.initial_lr + (optimizer.lr - optimizer.initial_lr) * (steps - 1) / warmup
    return (
        f"warm-up of {warmup:,} steps is longer than the run of {steps:,}, whose last has a learning rate of "
        f"{last:.2g} in place of {shown(optimizer.lr)}"
    )
