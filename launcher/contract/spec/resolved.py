"""The resolved config of a run: a RunSpec written as YAML, and read back by every rank."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import yaml

from launcher.contract.errors import ConfigError
from launcher.contract.spec.fields import FieldType, field_types, mapped_section, section_type
from launcher.contract.spec.run import RunSpec

_YAML_LINE_BREAKS = "\x85\u2028\u2029"

_SEAL = "# sha256 of what follows: "
"""How the first line of config.yaml begins. A file that lost its end would else be read as a shorter config, whose
other values are defaults. If the number sign itself is damaged, the line is a key that no config has."""


def to_yaml(spec: RunSpec) -> str:
    """Return the spec as YAML, keys in schema order: without the digest of config.yaml."""
    values = dataclasses.asdict(spec)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if any(character in text for character in _YAML_LINE_BREAKS):  # the writer would leave them bare, and fold them
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=120)
    return text


def sealed(spec: RunSpec) -> str:
    """Return the content of config.yaml: the spec as YAML behind a line with its digest."""
    text = to_yaml(spec)
    return f"{_SEAL}{_digest(text)}\n{text}"


def read_resolved(path: Path) -> RunSpec:
    """Read a config that `sealed` wrote, or an earlier version, without interpolation or conversion.

    Raise ConfigError for a file that is gone, damaged or edited: a resolved config is not an input form.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _check_seal(text, path)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path} cannot be read: no such file") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    return cast(RunSpec, _build(RunSpec, values, f"{path}: "))


def is_config_of(path: Path, spec: RunSpec) -> bool:
    """Return whether the file holds this very config, as this version or an earlier one wrote it."""
    return path.read_text(encoding="utf-8") in (sealed(spec), to_yaml(spec))


def _check_seal(text: str, path: Path) -> None:
    """Raise ConfigError where the text is not what its first line was written for. Earlier versions wrote no line."""
    head, _, rest = text.partition("\n")
    if head.startswith("#") and head != f"{_SEAL}{_digest(rest)}":
        raise ConfigError(
            f"{path} is damaged or was edited: its SHA-256 is not the one in its first line. Settings are changed with "
            f"`launcher resubmit {path.absolute().parent.name} key=value`; submit run.lock.yaml to make the run anew"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _build(section: type, values: object, where: str) -> object:
    """Return an instance of the dataclass `section`.

    A key that is absent came with a later version: its default is what the run was made with.
    """
    types = field_types(section)
    given = _mapping(values, types, where)
    return section(**{name: _value(types[name], value, f"{where}{name}.") for name, value in given.items()})


def _value(kind: FieldType, value: object, where: str) -> object:
    mapped = mapped_section(kind)
    if mapped is not None:
        return {name: _build(mapped, item, f"{where}{name}.") for name, item in _mapping(value, None, where).items()}
    inner = section_type(kind)
    return value if inner is None else _build(inner, value, where)


def _mapping(values: object, known: Iterable[str] | None, where: str) -> dict[str, object]:
    """Return the values as a mapping.

    Raise ConfigError where they are none, or have a key that is not known.
    """
    unknown = ["no mapping"]
    if isinstance(values, dict):
        unknown = [] if known is None else sorted(map(str, values.keys() - set(known)))
        if not unknown:
            return values
    raise ConfigError(
        f"{where}not of a resolved config: {', '.join(unknown)}; RUN/config.yaml is meant, as `launcher submit` writes "
        "it; this one was edited, made by a newer version, or not yet submitted"
    )
