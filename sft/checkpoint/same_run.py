"""Whether a run may go on from a checkpoint: what it trains, and on which batches, must be what the checkpoint records.

Ranks ask before they load it. The launcher asks before it submits, as far as it can know; so both refuse the same, in
the same words. Neither torch nor Megatron-core is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.contract.errors import ConfigError
from launcher.contract.spec import RunSpec
from sft.checkpoint.contents import TrainerState, optimizer_form
from sft.checkpoint.same_model import model_problems
from sft.data.prepared.data_key import HASH
from sft.hf.checks import trained_adapters
from sft.hf.learning_rates import rate_groups
from sft.models.architecture import Architecture
from sft.models.numerics import numerics

_WHAT_A_CACHE_DEPENDS_ON = (
    " (the files, or what decides on their tokens: the tokenizer, data.chat_template, data.seq_length, data.loss_on, "
    "data.validation_split and their like)"
)
_DIGITS = 12
"""Of a hash, what people are shown."""


def check_same_run(
    source: Path, trainer: TrainerState, spec: RunSpec, architecture: Architecture, data_key: Mapping[str, object]
) -> None:
    """Raise ConfigError where a run has other data, adapters or another model than the one that wrote a checkpoint.

    The same where its optimizer's states are in a form that this run's optimizer cannot read.
    """
    problems = run_problems(source, trainer, spec, architecture, data_key)
    if problems:
        raise ConfigError(problems)


def run_problems(
    source: Path,
    trainer: TrainerState,
    spec: RunSpec,
    architecture: Architecture | None,
    data_key: Mapping[str, object],
) -> list[str]:
    """Return what `check_same_run` says, of a model that is not there yet (None) only what does not depend on it."""
    problems = data_problems(source, trainer, data_key)
    if architecture is not None:
        problems += model_problems(source, trainer, numerics(architecture))
        problems += adapter_problems(source, trainer, trained_adapters(spec.model.lora, architecture))
    problems += _optimizer_problems(source, trainer, optimizer_form(spec.train))
    return problems + _rate_problems(source, trainer, rate_groups(spec.train.optimizer))


def data_problems(source: Path, trainer: TrainerState, data_key: Mapping[str, object]) -> list[str]:
    """Return whether a checkpoint belongs to other data, or to another order of them, as a problem for people."""
    consequence = "Going on would repeat or skip examples"
    return _problems(source, trainer.data_key, data_key, "over other batches", consequence)


def adapter_problems(source: Path, trainer: TrainerState, adapters: Mapping[str, object]) -> list[str]:
    """Return whether a checkpoint holds other adapters than a run trains, or would scale otherwise."""
    consequence = "Going on would lose adapters, or change what they do"
    return _problems(source, trainer.adapters, adapters, "that trained something else", consequence)


def _optimizer_problems(source: Path, trainer: TrainerState, form: Mapping[str, object]) -> list[str]:
    differs = "that stores the optimizer's states in another form"
    return _problems(source, trainer.optimizer, form, differs, "They cannot be read")


def _rate_problems(source: Path, trainer: TrainerState, groups: Sequence[str]) -> list[str]:
    """Return whether the optimizer's states in a checkpoint are grouped in another way than in a run."""
    before = list(trainer.rate_groups)
    if before == list(groups):
        return []
    was, now = (", ".join(names) or "no parameters" for names in (before, groups))
    return [
        f"{source} has learning rates of their own for {was}, and this run for {now} (train.optimizer.lr_by_name, "
        "loraplus_ratio); the optimizer's states are stored by that. Rates may change on resume, these may not: "
        "put them back, or start a new run with model.path set to the exported model"
    ]


def _problems(
    source: Path, before: Mapping[str, object] | None, now: Mapping[str, object], differs: str, consequence: str
) -> list[str]:
    """Return whether a checkpoint records other values than a run's. Earlier ones record None."""
    if before is None or before == now:
        return []
    return [
        f"{source} was written by a run {differs}: {differences(before, now)}. {consequence}. Put that back, or "
        "start a new run with model.path set to the exported model"
    ]


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Return how two records differ, by the keys of the config."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    each = [f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}" for name in names]
    return "; ".join(each) + (_WHAT_A_CACHE_DEPENDS_ON if any(_is_cache(now.get(name)) for name in names) else "")


def _is_cache(value: object) -> bool:
    """Return whether a value of a data key is the hash of tokenized data."""
    return isinstance(value, str) and value.startswith(HASH)


def _shown(value: object) -> str:
    """Return a value for people, shortened if it is the hash of a cache."""
    if _is_cache(value):
        return str(value)[: len(HASH) + _DIGITS]
    return "unset" if value is None else json.dumps(value)
