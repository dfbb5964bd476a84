"""TRLConfig and its sections, with the fields and defaults of trlx. No key is ignored silently.

They are mutable, unlike all other configs here, because programs assign to them. sft/compat/trlx/settings.py and
docs/how-to/nemo-and-trlx.md say what becomes of each field.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar

import yaml

from launcher.contract.errors import ConfigError, did_you_mean

T = TypeVar("T", bound="_Section")

Kwargs = dict[str, Any]
"""Keyword arguments, which programs write as dicts of any values."""


class _Section:
    """A section of a TRLConfig."""

    @classmethod
    def from_dict(cls: type[T], config: Mapping[str, object]) -> T:
        """Return the section with these values, or raise ConfigError with every unknown and every missing key."""
        section = cls.__name__.removesuffix("Config").lower()
        return _section(cls, config, "method" if issubclass(cls, MethodConfig) else section)


@dataclass
class MethodConfig(_Section):
    """The objective, by name."""

    name: str


@dataclass
class SFTConfig(MethodConfig):
    """Supervised fine-tuning."""

    gen_kwargs: Kwargs
    """How answers to evaluation prompts are sampled."""


@dataclass
class ModelConfig(_Section):
    """The model."""

    model_path: str
    model_arch_type: str = "causal"
    num_layers_unfrozen: int = -1
    peft_config: Any = None
    model_extra_configs: Kwargs = field(default_factory=dict)


@dataclass
class TokenizerConfig(_Section):
    """The tokenizer."""

    tokenizer_path: str
    padding_side: str = "left"
    truncation_side: str = "right"
    tokenizer_extra_configs: Kwargs = field(default_factory=dict)


@dataclass
class OptimizerConfig(_Section):
    """The optimizer: lr, betas, eps and weight_decay are in `kwargs`."""

    name: str
    kwargs: Kwargs = field(default_factory=dict)


@dataclass
class SchedulerConfig(_Section):
    """The learning rate schedule: T_max and eta_min are in `kwargs`."""

    name: str
    kwargs: Kwargs = field(default_factory=dict)


@dataclass
class TrainConfig(_Section):
    """Length, batch, evaluation, checkpoints and logging."""

    total_steps: int
    seq_length: int
    epochs: int
    batch_size: int
    checkpoint_interval: int
    eval_interval: int
    pipeline: str
    trainer: str
    trainer_kwargs: Kwargs = field(default_factory=dict)
    project_name: str = "trlx"
    run_name: Optional[str] = None
    entity_name: Optional[str] = None
    group_name: Optional[str] = None
    checkpoint_dir: str = "ckpts"
    rollout_logging_dir: Optional[str] = None
    save_best: bool = True
    save_optimizer: bool = True
    resume_from_checkpoint: Optional[str] = None
    tracker: Optional[str] = "wandb"
    logging_dir: Optional[str] = None
    tags: Optional[list[str]] = field(default_factory=list)
    seed: int = 1000
    minibatch_size: Optional[int] = None


@dataclass
class TRLConfig:
    """All settings of a training."""

    method: MethodConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    tokenizer: TokenizerConfig
    train: TrainConfig

    @classmethod
    def load_yaml(cls, yml_fp: str | Path) -> TRLConfig:
        """Return the config in a YAML file, or raise ConfigError with the file and every problem."""
        path = Path(yml_fp)
        try:
            return cls.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except ConfigError as error:
            raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> TRLConfig:
        """Return the config with these sections, or raise ConfigError with every unknown and every missing key."""
        if not isinstance(config, Mapping):
            raise ConfigError(f"a TRLConfig has the sections {', '.join(_SECTIONS)}; found {type(config).__name__}")
        problems = [f"{name}: not a section{did_you_mean(name, _SECTIONS)}" for name in config if name not in _SECTIONS]
        built: dict[str, Any] = {}
        for name, section in _SECTIONS.items():
            try:
                if name not in config:
                    raise ConfigError(f"{name}: missing section")
                values = config[name]
                built[name] = _section(_method(values) if name == "method" else section, values, name)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return cls(**built)

    def to_dict(self) -> dict[str, object]:
        """Return the sections as dicts, copied."""
        return {name: copy.deepcopy(vars(getattr(self, name))) for name in _SECTIONS}

    def evolve(self, **kwargs: object) -> TRLConfig:
        """Return a copy with changes, nested as the sections are: evolve(train=dict(seed=2))."""
        return TRLConfig.from_dict(_merged(self.to_dict(), _in_place(kwargs)))

    @classmethod
    def update(cls, baseconfig: Mapping[str, object] | TRLConfig, config: Mapping[str, object]) -> TRLConfig:
        """Return a copy of `baseconfig` with changes, nested or by dotted names: {"train.seed": 2}."""
        base = baseconfig.to_dict() if isinstance(baseconfig, TRLConfig) else copy.deepcopy(dict(baseconfig))
        nested: dict[str, object] = {}
        for name, value in config.items():
            for part in reversed(name.split(".")[1:]):
                value = {part: value}
            nested = _merged(nested, {name.partition(".")[0]: value})
        return cls.from_dict(_merged(base, _in_place(nested)))

    def __str__(self) -> str:
        return json.dumps(self.to_dict(), indent=4, default=str)


_SECTIONS: dict[str, type[_Section]] = {
    "method": MethodConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "tokenizer": TokenizerConfig,
    "train": TrainConfig,
}

_OTHER_METHODS = ("ppoconfig", "ilqlconfig", "rftconfig")


def _method(values: object) -> type[_Section]:
    """Return the class of a method section by its name, or raise ConfigError."""
    name = values.get("name") if isinstance(values, Mapping) else None
    if isinstance(name, str) and name.lower() == "sftconfig":
        return SFTConfig
    if isinstance(name, str) and name.lower() in _OTHER_METHODS:
        raise ConfigError(
            f"method.name: {name} is reinforcement learning, which this project does not do; SFTConfig fine-tunes on "
            "samples, and trl or OpenRLHF train against a reward"
        )
    raise ConfigError(f"method.name: {name!r} is not SFTConfig{did_you_mean(str(name).lower(), ['sftconfig'])}")


def _section(section: type[T], values: object, name: str) -> T:
    """Return the section `name` with these values, or raise ConfigError with every problem."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: {values!r} is not a section of keys and values")
    fields = {item.name: item for item in dataclasses.fields(typing.cast(Any, section))}
    problems = [f"{name}.{key}: not a known key{did_you_mean(key, fields)}" for key in values if key not in fields]
    missing = [
        key
        for key, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and key not in values
    ]
    problems += [f"{name}.{key}: missing" for key in missing]
    if problems:
        raise ConfigError(problems)
    return section(**values)


def _merged(base: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of `base` with `changes`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _in_place(changes: Mapping[str, object]) -> dict[str, object]:
    """Return `changes` with `tags` moved into the section `train`.

    trlx's own examples write them beside the sections, where trlx does not read them.
    """
    moved = dict(changes)
    if "tags" in moved:
        warnings.warn("tags belong to the section train, evolve(train=dict(tags=...)); moved there", stacklevel=3)
        train = moved.get("train", {})
        moved["train"] = _merged({"tags": moved.pop("tags")}, train) if isinstance(train, Mapping) else train
    return moved
