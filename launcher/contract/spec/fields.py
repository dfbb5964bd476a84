"""The fields of config dataclasses, walked: their types, their rules, their values.

Everything that treats fields alike reads them here: YAML and overrides take the types, checks the rules, and whatever
concerns files the path rules. Values are walked by the class of each section's instance, types by annotation.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from launcher.contract.spec.paths import PathRule
from launcher.contract.spec.rules import Rule

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Section = TypeVar("Section", bound=DataclassInstance)

FieldType = object
"""The type of a field as typing spells it: a class, `list[str]`, `int | None`."""

Problem = tuple[str, str]
"""Dotted key, and what is wrong with its value."""

ANY_NAME = "NAME"
"""Stands in a dotted key for a name of the user's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PathField:
    """One path in a config."""

    key: str
    """Dotted key of the field that holds it."""
    name: str | None
    """Its name, where the field is a mapping of names to paths."""
    rule: PathRule
    path: str
    section: object
    """The dataclass instance with the field."""
    mapped_by: str | None
    """Key of the mapping of sections that the field is in, such as data.sources."""


@cache
def field_types(section: type) -> Mapping[str, FieldType]:
    """Return field name -> type of a config dataclass, without the rules."""
    hints = typing.get_type_hints(section)
    return {item.name: hints[item.name] for item in dataclasses.fields(section)}


@cache
def field_rules(section: type) -> Mapping[str, tuple[Rule | PathRule, ...]]:
    """Return field name -> rules, for the fields of a config dataclass that have some."""
    hints = typing.get_type_hints(section, include_extras=True)
    rules = {}
    for item in dataclasses.fields(section):
        metadata = getattr(hints[item.name], "__metadata__", ())
        rules[item.name] = tuple(entry for entry in metadata if isinstance(entry, Rule | PathRule))
    return {name: entries for name, entries in rules.items() if entries}


def mapped_section(kind: FieldType) -> type | None:
    """Return the dataclass that a field of this type maps names of the user's own to, or None."""
    arguments = typing.get_args(kind)
    is_mapped = typing.get_origin(kind) is dict and dataclasses.is_dataclass(arguments[1])
    return typing.cast(type, arguments[1]) if is_mapped else None


def section_type(kind: FieldType) -> type | None:
    """Return the type itself where it is a config dataclass, else None."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def leaf_types(section: type, prefix: str = "") -> Iterator[tuple[str, FieldType]]:
    """Yield dotted key and type of every value below `section`, in schema order.

    ANY_NAME stands where the user names sections.
    """
    for name, kind in field_types(section).items():
        if (mapped := mapped_section(kind)) is not None:
            yield from leaf_types(mapped, f"{prefix}{name}.{ANY_NAME}.")
        elif (inner := section_type(kind)) is not None:
            yield from leaf_types(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def rule_problems(section: DataclassInstance, prefix: str = "") -> Iterator[Problem]:
    """Yield every value below `section` that breaks a rule of its field."""
    for item in dataclasses.fields(section):
        yield from field_problems(section, item.name, prefix)
        for name, inner in _inner_sections(getattr(section, item.name)):
            yield from rule_problems(inner, f"{prefix}{item.name}.{name}")


def field_problems(section: DataclassInstance, name: str, prefix: str = "") -> Iterator[Problem]:
    """Yield what is wrong with the value of one field: where the first rule that is broken is broken."""
    value = getattr(section, name)
    if value is None:
        return
    for rule in field_rules(type(section)).get(name, ()):
        if isinstance(rule, Rule):
            wrong = [item for item in rule.values(value) if not rule.allows(item)]
            if wrong:
                yield from ((f"{prefix}{name}", rule.problem(item)) for item in wrong)
                return


def values_under(section: DataclassInstance, rule: Rule, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted key and text of every value below `section` whose field has this very rule."""
    rules = field_rules(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if rule in rules.get(item.name, ()):
            yield from ((f"{prefix}{item.name}", text) for _, text in _texts(value) if text)
        for name, inner in _inner_sections(value):
            yield from values_under(inner, rule, f"{prefix}{item.name}.{name}")


def path_fields(section: DataclassInstance, prefix: str = "", mapped_by: str | None = None) -> Iterator[PathField]:
    """Yield every path below `section`, in schema order, without words that only stand in place of one."""
    rules = field_rules(type(section))
    for item in dataclasses.fields(section):
        key, value = f"{prefix}{item.name}", getattr(section, item.name)
        for rule in rules.get(item.name, ()):
            if isinstance(rule, PathRule):
                for name, path in _texts(value):
                    if path and rule.is_path(path, section):
                        yield PathField(key=key, name=name, rule=rule, path=path, section=section, mapped_by=mapped_by)
        for name, inner in _inner_sections(value):
            yield from path_fields(inner, f"{key}.{name}", key if name else mapped_by)


def with_absolute_paths(section: Section) -> Section:
    """Return `section` with all paths in it absolute, and globs in lists replaced by what they match."""
    rules = field_rules(type(section))
    changed = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        path_rule = next((rule for rule in rules.get(item.name, ()) if isinstance(rule, PathRule)), None)
        changed[item.name] = _absolute(value, path_rule, section)
    return dataclasses.replace(section, **changed)


def _absolute(value: object, rule: PathRule | None, section: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return with_absolute_paths(value)
    if isinstance(value, dict):
        return {name: _absolute(item, rule, section) for name, item in value.items()}
    if rule is None:
        return value
    if isinstance(value, list):
        return [path for text in value for path in (rule.expand(text) if rule.is_path(text, section) else [text])]
    return rule.absolute(value) if isinstance(value, str) and value and rule.is_path(value, section) else value


def _inner_sections(value: object) -> Iterator[tuple[str, DataclassInstance]]:
    """Yield the sections that a field holds, each with what it adds to the key: nothing, or its name and a dot."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield "", value
    elif isinstance(value, dict):
        for name, item in value.items():
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                yield f"{name}.", item


def _texts(value: object) -> list[tuple[str | None, str]]:
    """Return the texts in a field's value, each with its name where the field is a mapping."""
    if isinstance(value, str):
        return [(None, value)]
    if isinstance(value, list):
        return [(None, item) for item in value]
    return list(value.items()) if isinstance(value, dict) else []
