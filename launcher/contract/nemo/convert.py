"""Convert a NeMo config into our keys and, where it describes a model, into that model's config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.leaves import Leaf, Leaves
from launcher.contract.nemo.document import read_document
from launcher.contract.nemo.entries import Entries, Entry, value_of
from launcher.contract.nemo.model_config import KEYS, describes_model, model_config
from launcher.contract.nemo.rule import Refused, Translation
from launcher.contract.nemo.rules import RULES, rule_of
from launcher.contract.usual_keys import HfConfig

_ABSENT: dict[str, tuple[dict[str, object], str]] = {
    "trainer.precision": ({"train.precision": "fp32"}, "32"),
    "trainer.gradient_clip_val": ({"train.optimizer.clip_grad": 0.0}, "no clipping"),
    "model.optim.betas": ({"train.optimizer.beta1": 0.9, "train.optimizer.beta2": 0.999}, "0.9, 0.999"),
    "model.optim.sched.name": ({"train.optimizer.schedule": "constant"}, "a constant learning rate"),
}
"""Keys for which NeMo has another default than we have: our settings for it, and the default in words."""

_ABSENT_WITH_MODEL: dict[str, tuple[dict[str, object], str]] = {
    f"model.{name}": ({f"model.{name}": 0.1}, "0.1") for name in ("hidden_dropout", "attention_dropout")
}
"""The same for files that describe a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One NeMo key, where it stands, and what it means here."""

    key: str
    where: str
    translation: Translation


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A converted NeMo config."""

    outcomes: tuple[Outcome, ...]
    model: HfConfig | None
    """config.json of the model, if the file describes one."""

    def settings(self) -> Iterator[tuple[str, object, Outcome]]:
        """Yield our keys, their values, and the outcome that set them."""
        for outcome in self.outcomes:
            for key, value in outcome.translation.settings.items():
                yield key, value, outcome


def convert(text: str, shown: str) -> Conversion:
    """Convert a YAML text, or raise ConfigError that lists every key without a counterpart.

    `shown` is the name of the file in messages.
    """
    return convert_entries(read_document(text, shown), shown)


def convert_entries(entries: Entries, shown: str) -> Conversion:
    """Convert the result of `read_document`, like `convert`."""
    outcomes, problems = [], []
    for key, entry in entries.items():
        try:
            outcomes.append(Outcome(key=key, where=entry.where, translation=_translate(key, entry, entries)))
        except Refused as error:
            problems.append(f"{entry.where}: {key}: {error}")
        except ConfigError as error:  # the rule reads another key, whose value is wrong
            problems += error.problems
    outcomes += _absent(entries, shown)
    model = None
    if describes_model(entries):
        try:
            model = model_config(entries)
        except ConfigError as error:
            problems += error.problems
    problems += contradictions(outcomes)
    if problems:
        raise ConfigError(problems)
    return Conversion(outcomes=tuple(outcomes), model=model)


def _translate(key: str, entry: Entry, entries: Entries) -> Translation:
    if key in KEYS:
        return Translation(note="in the model's config.json")
    rule = rule_of(key)
    if rule is None and not entry.value and rule_of(f"{key}."):
        return Translation(note="an empty section")
    if rule is None:
        raise Refused(f"not a known key{did_you_mean(key, RULES)}; remove it if nothing depends on it")
    return rule(entry.value, entries)


def _absent(entries: Entries, shown: str) -> list[Outcome]:
    """Return NeMo's defaults for absent keys, where ours differ."""
    defaults = _ABSENT | (_ABSENT_WITH_MODEL if describes_model(entries) else {})
    return [
        Outcome(
            key=key, where=shown, translation=Translation(settings, f"not in the file, which means {meaning} to NeMo")
        )
        for key, (settings, meaning) in defaults.items()
        if value_of(entries, key) is None
    ]


def contradictions(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield the keys that set one of ours to different values."""
    first: dict[str, tuple[object, Outcome]] = {}
    for outcome in outcomes:
        for key, value in outcome.translation.settings.items():
            before = first.setdefault(key, (value, outcome))
            # The schedule may override the learning rate: without a step to decay, all steps run at min_lr.
            if before[0] != value and outcome.key != "model.optim.sched.name":
                yield f"{outcome.where}: {outcome.key}: {value!r} contradicts {before[1].key} {before[0]!r}"


def read_leaves(text: str, shown: str) -> Leaves:
    """Return our keys as those of an own config are read, each with its line in the NeMo file."""
    try:
        conversion = convert(text, shown)
    except ConfigError as error:
        return Leaves(problems=list(error.problems))
    return Leaves(
        values={key: Leaf(value, "file", outcome.where) for key, value, outcome in conversion.settings()},
        described=conversion.model,
    )


def to_yaml(conversion: Conversion, more: Mapping[str, object]) -> str:
    """Return the config as our YAML, with the NeMo key behind each line. `more` are settings that the file lacks."""
    written = {key: (value, outcome.key) for key, value, outcome in conversion.settings()}
    lines: list[str] = []
    _sections({**written, **{key: (value, "") for key, value in more.items()}}, "", lines)
    return "\n".join(lines) + "\n"


def _sections(settings: Mapping[str, tuple[object, str]], indent: str, lines: list[str]) -> None:
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
    """Return one line for each NeMo key: what it means here."""
    width = max((len(outcome.key) for outcome in conversion.outcomes), default=0)
    return "\n".join(f"{outcome.key:<{width}}  {_words(outcome.translation)}" for outcome in conversion.outcomes)


def _words(translation: Translation) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in translation.settings.items())
    return " - ".join(part for part in (settings and f"-> {settings}", translation.note) if part) or "not set"
