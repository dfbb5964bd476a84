"""Trainers by name. Upper and lower case are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from launcher.contract.errors import ConfigError, did_you_mean

T = TypeVar("T", bound=type)

_TRAINERS: dict[str, type] = {}

_ELSEWHERE = {
    "nemoilqltrainer": "reinforcement learning, which this project does not do",
    "nemoppotrainer": "reinforcement learning, which this project does not do",
    "accelerateilqltrainer": "reinforcement learning, which this project does not do",
    "accelerateppotrainer": "reinforcement learning, which this project does not do",
    "acceleraterfttrainer": "reinforcement learning, which this project does not do",
    "acceleratesfttrainer": "trlx's trainer on accelerate; NeMoSFTTrainer without a megatron_cfg takes its settings",
}


def register_trainer(name: str | T) -> Any:
    """Register a trainer class, as a decorator, under its own name or under the one given."""
    if isinstance(name, str):
        return cast(Callable[[T], T], lambda trainer: _register(trainer, name))
    return _register(name, name.__name__)


def _register(trainer: T, name: str) -> T:
    _TRAINERS[name.lower()] = trainer
    return trainer


def get_trainer(name: str) -> Any:
    """Return the trainer registered under `name`, or raise ConfigError with those that exist."""
    trainer_class = _TRAINERS.get(name.lower())
    if trainer_class is not None:
        return trainer_class
    known = sorted(trainer.__name__ for trainer in _TRAINERS.values())
    if name.lower() in _ELSEWHERE:
        raise ConfigError(f"train.trainer: {name} is {_ELSEWHERE[name.lower()]}; known: {', '.join(known)}")
    near = did_you_mean(name.lower(), _TRAINERS)
    raise ConfigError(f"train.trainer: no trainer {name!r} is registered{near}; known: {', '.join(known)}")
