"""Convert a config of TRL, axolotl or LLaMA-Factory into our keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.nemo.convert import Conversion, Outcome, contradictions
from launcher.contract.nemo.document import read_document
from launcher.contract.nemo.entries import Entries, Entry
from launcher.contract.nemo.rule import Refused, Translation
from launcher.contract.trainers import axolotl, llama_factory, trl
from launcher.contract.trainers.word import GPUS, Absent, Word


@dataclass(frozen=True, slots=True)
class Trainer:
    """What has to be known of a trainer to read its configs."""

    name: str
    marks: frozenset[str]
    """Keys of which only its configs have one."""
    words: Mapping[str, Word]
    absent: Sequence[Absent]
    defaults: Mapping[str, object]
    """Keys that count as written where they are absent."""


TRAINERS = (
    Trainer(
        "axolotl",
        frozenset({"base_model"}),
        axolotl.WORDS,
        axolotl.ABSENT,
        axolotl.DEFAULTS,
    ),
    Trainer(
        "LLaMA-Factory",
        frozenset({"stage", "finetuning_type", "cutoff_len", "dataset_dir", "template"}),
        llama_factory.WORDS,
        llama_factory.ABSENT,
        llama_factory.DEFAULTS,
    ),
    Trainer(
        "TRL",
        frozenset({"model_name_or_path", "per_device_train_batch_size", "num_train_epochs", "dataset_name"}),
        trl.WORDS,
        trl.ABSENT,
        trl.DEFAULTS,
    ),
)
"""In the order in which they are recognised: LLaMA-Factory has TRL's marks, too."""

_OWN_SECTIONS = {"model", "data", "train"}


def recognised(text: str) -> Trainer | None:
    """Return the trainer that a YAML text is a config of, or None."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return None
    if not isinstance(node, yaml.MappingNode):
        return None
    keys = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
    if keys & _OWN_SECTIONS:
        return None
    return next((trainer for trainer in TRAINERS if keys & trainer.marks), None)


def convert(text: str, shown: str, trainer: Trainer, gpus: int) -> Conversion:
    """Convert a YAML text, or raise ConfigError that lists every key without a counterpart.

    `shown` is the name of the file in messages; `gpus` is how many the batch of the file is for.
    """
    written = read_document(text, shown)
    default = {key: Entry(value, shown) for key, value in trainer.defaults.items() if key not in written}
    entries: Entries = {**written, **default, GPUS: Entry(gpus, GPUS)}
    outcomes, problems = [], []
    for key, entry in {**written, **default}.items():
        try:
            translation = _translate(key, entry, entries, trainer)
        except Refused as error:
            problems.append(f"{entry.where}: {key}: {error}")
        except ConfigError as error:  # the rule reads another key, whose value is wrong
            problems += error.problems
        else:
            if key in default:
                translation = Translation(translation.settings, _absent(trainer, repr(entry.value), translation.note))
            outcomes.append(Outcome(key=key, where=entry.where, translation=translation))
    outcomes += _of_absent_keys(written, shown, trainer)
    problems += contradictions(outcomes)
    if problems:
        raise ConfigError(problems)
    return Conversion(outcomes=tuple(outcomes), model=None)


def _translate(key: str, entry: Entry, entries: Entries, trainer: Trainer) -> Translation:
    word = trainer.words.get(key) or trainer.words.get(key.partition(".")[0])
    if word is None:
        raise Refused(
            f"not a word of {trainer.name} that is known{did_you_mean(key, trainer.words)}; remove it if "
            "nothing depends on it"
        )
    return word.rule(entry.value, entries)


def _absent(trainer: Trainer, meaning: str, more: str = "") -> str:
    note = f"not in the file; to {trainer.name} that means {meaning}"
    return f"{note}; {more}" if more else note


def _of_absent_keys(written: Entries, shown: str, trainer: Trainer) -> Iterator[Outcome]:
    """Yield the trainer's defaults for absent keys, where ours differ."""
    for absent in trainer.absent:
        if all(key not in written or written[key].value is None for key in absent.keys):
            note = _absent(trainer, absent.meaning)
            yield Outcome(key=absent.keys[0], where=shown, translation=Translation(absent.settings, note))
