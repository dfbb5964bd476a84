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

    A warm-up of just `steps` is none of them: a rate that rises to the end, as a search for a learning rate wants it.
    With decay_steps the schedule is as long as that, whatever the run has of it.
    """
    warmup, end = warmup_of(optimizer, steps), optimizer.decay_steps or steps
    if warmup > end and optimizer.decay_steps is None:
        last = optimizer.initial_lr + (optimizer.lr - optimizer.initial_lr) * (steps - 1) / warmup
        yield (
            "train.optimizer.warmup_steps",
            f"{warmup} is more than the {steps:,} steps of the run, whose last would have a learning rate of "
            f"{last:.2g} in place of {shown(optimizer.lr)}; lower it, or give train.optimizer.warmup_ratio",
        )
    elif optimizer.wsd_steps and optimizer.wsd_steps > end - warmup >= 0:
        yield (
            "train.optimizer.wsd_steps",
            f"{optimizer.wsd_steps} is more than the {end - warmup} steps after the warm-up",
        )
