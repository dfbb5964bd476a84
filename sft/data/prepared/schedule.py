"""Which examples each step of a run holds, how many steps there are, and whether the learning rate's schedule fits."""

from __future__ import annotations

from launcher.contract.errors import ConfigError
from launcher.contract.spec import RunSpec
from launcher.contract.spec.rules import shown
from launcher.contract.steps import schedule_problems, warmup_remark
from sft.data.batches.mixture import Mixture
from sft.data.batches.sampler import BatchSchedule, CyclicSchedule, ExampleSchedule, TokenSchedule
from sft.data.cache.store import Examples
from sft.data.prepared.sources import Sources


def training_schedule(spec: RunSpec, cache: Examples) -> BatchSchedule:
    """Return the schedule of the training data: which examples each step holds."""
    if spec.data.cyclic_seed is None:
        return batch_schedule(spec, cache, shuffle=spec.data.shuffle)
    assert spec.train.max_steps is not None, "launcher.contract.config.checks asks for it"
    return CyclicSchedule(
        num_examples=len(cache),
        global_batch_size=spec.train.global_batch_size,
        max_steps=spec.train.max_steps,
        seed=spec.data.cyclic_seed,
    )


def batch_schedule(spec: RunSpec, cache: Examples, *, shuffle: bool) -> BatchSchedule:
    """Return the schedule of `cache`, training or held-out data: which examples each step holds."""
    train = spec.train
    mixture = Mixture(shares=cache.shares, seed=train.seed, shuffle=shuffle) if isinstance(cache, Sources) else None
    if train.global_batch_unit == "tokens":
        return TokenSchedule(
            lengths=cache.lengths - 1,
            row_length=spec.data.seq_length,
            rows_per_step=train.global_batch_size // spec.data.seq_length,
            seed=train.seed,
            shuffle=shuffle,
            mixture=mixture,
        )
    return ExampleSchedule(
        num_examples=len(cache),
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        shuffle=shuffle,
        mixture=mixture,
        group_lengths=cache.lengths if spec.data.group_by_length and shuffle else None,
    )


def steps_of(spec: RunSpec, schedule: BatchSchedule) -> int:
    """Return the optimizer steps of the whole run."""
    train = spec.train
    return train.max_steps if train.max_steps is not None else schedule.steps_in(train.epochs or 1.0)


def check_schedule(spec: RunSpec, examples: Examples) -> str | None:
    """Return what to say of a warm-up that the steps of train.epochs are too few for: the launcher cannot know them.

    Raise ConfigError if they are too few for the rest of the schedule.
    """
    optimizer = spec.train.optimizer
    if spec.train.epochs is None or not (optimizer.warmup_steps or optimizer.wsd_steps):
        return None
    steps = steps_of(spec, training_schedule(spec, examples))
    length = f"train.epochs {shown(spec.train.epochs)} comes to {steps:,} steps"
    problems = [f"{key}: {text} ({length})" for key, text in schedule_problems(optimizer, steps)]
    if problems:
        raise ConfigError(problems)
    return warmup_remark(optimizer, steps)
