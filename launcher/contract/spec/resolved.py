"""The resolved config of a run: a RunSpec written as YAML, and read back by every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import yaml

from launcher.contract.errors import ConfigError
from launcher.contract.spec.fields import FieldType, field_types, mapped_section, section_type
from launcher.contract.spec.run import RunSpec

_YAML_LINE_BREAKS = "\x85\u2028\u2029"


def to_yaml(spec: RunSpec) -> str:
    """Return the spec as YAML, keys in schema order: the content of config.yaml."""
    values = dataclasses.asdict(spec)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if any(character in text for character in _YAML_LINE_BREAKS):  # the writer would leave them bare, and fold them
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=120)
    return text


def read_resolved(path: Path) -> RunSpec:
    """Read a config that `to_yaml` wrote, here or in an earlier version, without interpolation or conversion.

    Raise ConfigError for a file that was edited into something else: a resolved config is not an input form.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    return cast(RunSpec, _build(RunSpec, values, f"{path}: "))


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
        f"{where}not of a resolved config: {', '.join(unknown)}; it was edited, or made by a newer version"
    )
