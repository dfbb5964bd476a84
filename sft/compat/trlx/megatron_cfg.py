"""Read the NeMo config of a trainer from a file, a name, a dict or an OmegaConf config, and convert it to our keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from launcher.contract.config.text import read_text
from launcher.contract.errors import ConfigError
from launcher.contract.nemo.convert import Conversion, convert_entries
from launcher.contract.nemo.document import read_document
from launcher.contract.nemo.entries import Entry, value_of
from sft.compat.trlx.defaults import NAMED

_TAKEN_HERE = ("model.data.add_bos", "model.data.add_eos", "model.data.eod_mask_loss", "model.resume_from_checkpoint")
"""Keys that NeMoSFTTrainer reads itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronConfig:
    """A NeMo config, and what it converts to."""

    entries: Mapping[str, Entry]
    conversion: Conversion

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of a NeMo key, or `default` where it is absent or null."""
        return value_of(self.entries, key, default)

    def speaks_of(self, section: str) -> bool:
        """Return whether the config has a key in this section that is not null."""
        return any(key.startswith(section) and entry.value is not None for key, entry in self.entries.items())


def read_megatron_config(given: str | Path | Mapping[str, object] | DictConfig, vocab_size: int) -> MegatronConfig:
    """Return the given config, or raise ConfigError with every key that cannot be converted.

    `vocab_size` is the tokenizer's, for a config that describes a model without the size of its vocabulary.
    """
    text, shown = _text(given)
    entries = read_document(text, shown)
    if not any(key.startswith("model.") for key in entries) or not any(key.startswith("trainer.") for key in entries):
        raise ConfigError(f"{shown}: a NeMo config has the sections trainer and model")
    sizes = ("model.override_vocab_size", "model.padded_vocab_size")
    if all(value_of(entries, key) is None for key in sizes) and not _is_gpt2(entries):
        entries["model.padded_vocab_size"] = Entry(vocab_size, f"{shown}: the tokenizer")
    convertible = {key: entry for key, entry in entries.items() if key not in _TAKEN_HERE}
    return MegatronConfig(entries=entries, conversion=convert_entries(convertible, shown))


def _is_gpt2(entries: Mapping[str, Entry]) -> bool:
    return bool(value_of(entries, "model.tokenizer.type") == "GPT2BPETokenizer")


def _text(given: str | Path | Mapping[str, object] | DictConfig) -> tuple[str, str]:
    """Return the config as YAML, and its name for errors."""
    if isinstance(given, str) and not Path(given).exists() and given in NAMED:
        return OmegaConf.to_yaml(NAMED[given]()), given
    if isinstance(given, (str, Path)):
        return read_text(Path(given)), str(given)
    if isinstance(given, DictConfig):
        return OmegaConf.to_yaml(given), "megatron_cfg"
    if isinstance(given, Mapping):
        return yaml.safe_dump(_plain(given)), "megatron_cfg"
    raise ConfigError(f"megatron_cfg: {type(given).__name__} is not a path, a dict or an OmegaConf config")


def _plain(value: object) -> object:
    """Return a config value without the types that YAML cannot write."""
    if isinstance(value, DictConfig):
        return OmegaConf.to_container(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
