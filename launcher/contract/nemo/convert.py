"""A NeMo config -> our keys, a model's config.json where the file spells one out, and what became of every key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.leaves import Leaf, Leaves
from launcher.contract.nemo.document import Entry, read_document
from launcher.contract.nemo.model_config import KEYS, model_config, spells_out
from launcher.contract.nemo.rules import RULES, Entries, Fate, Refused, rule_of, value_of

_ABSENT: dict[str, tuple[dict[str, Any], str]] = {
    "trainer.precision": ({"train.precision": "fp32"}, "32"),
    "trainer.gradient_clip_val": ({"train.optimizer.clip_grad": 0.0}, "no clipping"),
    "model.optim.betas": ({"train.optimizer.beta1": 0.9, "train.optimizer.beta2": 0.999}, "0.9, 0.999"),
    "model.optim.sched.name": ({"train.optimizer.schedule": "constant"}, "a constant learning rate"),
}
"""Keys whose absence means something else to NeMo than to us: our settings, and what it means."""

_ABSENT_WITH_MODEL: dict[str, tuple[dict[str, Any], str]] = {
    f"model.{name}": ({f"model.{name}": 0.1}, "0.1") for name in ("hidden_dropout", "attention_dropout")
}
"""The same, in a file that spells its model out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one NeMo key."""

    key: str
    where: str
    fate: Fate


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A NeMo config, taken over."""

    outcomes: tuple[Outcome, ...]
    model: Mapping[str, Any] | None
    """config.json of the model that the file spells out."""

    def settings(self) -> Iterator[tuple[str, Any, Outcome]]:
        """Our keys, their values, and what set them."""
        for outcome in self.outcomes:
            for key, value in outcome.fate.settings.items():
                yield key, value, outcome


def convert(text: str, shown: str) -> Conversion:
    """Convert the YAML `text` of the file `shown`; ConfigError with every key that cannot be taken over."""
    return convert_entries(read_document(text, shown), shown)


def convert_entries(entries: Entries, shown: str) -> Conversion:
    """Convert what `read_document` gave; ConfigError with every key that cannot be taken over."""
    outcomes, problems = [], []
    for key, entry in entries.items():
        try:
            outcomes.append(Outcome(key=key, where=entry.where, fate=_fate(key, entry, entries)))
        except Refused as error:
            problems.append(f"{entry.where}: {key}: {error}")
    outcomes += _absent(entries, shown)
    model = None
    if spells_out(entries):
        try:
            model = model_config(entries)
        except ConfigError as error:
            problems += error.problems
    problems += _contradictions(outcomes)
    if problems:
        raise ConfigError(problems)
    return Conversion(outcomes=tuple(outcomes), model=model)


def _fate(key: str, entry: Entry, entries: Entries) -> Fate:
    if key in KEYS:
        return Fate(note="in the model's config.json")
    rule = rule_of(key)
    if rule is None and not entry.value and rule_of(f"{key}."):
        return Fate(note="an empty section")
    if rule is None:
        raise Refused(f"not a known key{did_you_mean(key, RULES)}; remove it if nothing depends on it")
    return rule(entry.value, entries)


def _absent(entries: Entries, shown: str) -> list[Outcome]:
    """What NeMo assumes where the file is silent and we would assume something else."""
    meant = _ABSENT | (_ABSENT_WITH_MODEL if spells_out(entries) else {})
    return [
        Outcome(key=key, where=shown, fate=Fate(settings, f"not in the file, which means {meaning} to NeMo"))
        for key, (settings, meaning) in meant.items()
        if value_of(entries, key) is None
    ]


def _contradictions(outcomes: list[Outcome]) -> Iterator[str]:
    """Two keys of the file that say different things of one of ours."""
    first: dict[str, tuple[Any, Outcome]] = {}
    for outcome in outcomes:
        for key, value in outcome.fate.settings.items():
            before = first.setdefault(key, (value, outcome))
            # The schedule's rule speaks last of the learning rate: it may have none of it left.
            if before[0] != value and outcome.key != "model.optim.sched.name":
                yield f"{outcome.where}: {outcome.key}: {value!r} contradicts {before[1].key} {before[0]!r}"


def read_leaves(text: str, shown: str) -> Leaves:
    """Our keys as `read_yaml` gives them, each with the line of the NeMo file it comes from."""
    try:
        conversion = convert(text, shown)
    except ConfigError as error:
        return Leaves(problems=list(error.problems))
    return Leaves(
        values={key: Leaf(value, "file", outcome.where) for key, value, outcome in conversion.settings()},
        described=conversion.model,
    )


def to_yaml(conversion: Conversion, more: Mapping[str, Any]) -> str:
    """A config of ours, each line with the key it comes from; `more` are settings that the file does not have."""
    written = {key: (value, outcome.key) for key, value, outcome in conversion.settings()}
    lines: list[str] = []
    _sections({**written, **{key: (value, "") for key, value in more.items()}}, "", lines)
    return "\n".join(lines) + "\n"


def _sections(settings: Mapping[str, tuple[Any, str]], indent: str, lines: list[str]) -> None:
    """Append the settings as nested YAML, values first."""
    for key, (value, origin) in settings.items():
        if "." not in key:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").rstrip("\n")
            lines.append(f"{indent}{key}: {text}" + (f"  # {origin}" if origin else ""))
    for section in dict.fromkeys(key.partition(".")[0] for key in settings if "." in key):
        lines.append(f"{indent}{section}:")
        inner = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{section}.")}
        _sections(inner, f"{indent}  ", lines)


def describe(conversion: Conversion) -> str:
    """One line a NeMo key: what became of it."""
    width = max((len(outcome.key) for outcome in conversion.outcomes), default=0)
    return "\n".join(f"{outcome.key:<{width}}  {_words(outcome.fate)}" for outcome in conversion.outcomes)


def _words(fate: Fate) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in fate.settings.items())
    return " - ".join(part for part in (settings and f"-> {settings}", fate.note) if part) or "not set"
