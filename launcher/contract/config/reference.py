"""Write docs/config.md from the fields of the config: their types, rules, defaults and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from launcher.contract.leaves import describe, is_dict, is_list
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import ANY_NAME, FieldType, field_rules, field_types, mapped_section, section_type
from launcher.contract.spec.rules import Above, AtLeast, Bits, Fraction, Names, Percent, Probability, Required

_BAR = "\\|"
_INTRO = """# Config reference

Every key of a run's YAML file. `launcher reference` prints this page from the source.
Any key can be set on the command line too: `launcher submit cfg.yaml train.max_steps=100`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyReference:
    """One key of the config."""

    key: str
    value: str
    """What a value must be, in words."""
    default: str
    meaning: str


def key_reference() -> list[KeyReference]:
    """Return every key of the config, in the order of the page."""
    return [row for _, _, rows in _sections(RunSpec, "") for row in rows]


def config_reference() -> str:
    """Return the whole page."""
    return _INTRO + "".join(_table(*section) for section in _sections(RunSpec, ""))


def _table(title: str, about: str, rows: Sequence[KeyReference]) -> str:
    head = f"\n## {title}\n\n{about}\n\n| key | value | default | meaning |\n|---|---|---|---|\n"
    return head + "".join(map(_line, rows))


def _line(row: KeyReference) -> str:
    cells = (f"`{row.key}`", row.value, row.default, row.meaning)
    return f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |\n"


def _sections(section: type, prefix: str) -> Iterator[tuple[str, str, list[KeyReference]]]:
    """Yield title, description and keys of this section, then those of its subsections."""
    types = field_types(section)
    inner = {name: below for name, kind in types.items() if (below := section_type(kind) or mapped_section(kind))}
    docs = _class_docs(Path(sys.modules[section.__module__].__file__ or ""))[section.__name__]
    rows = [
        KeyReference(
            key=f"{prefix}{item.name}",
            value=_value(section, item.name),
            default=_default(section, item),
            meaning=docs[item.name],
        )
        for item in dataclasses.fields(section)
        if item.name not in inner
    ]
    yield prefix.rstrip(".") or "top level", inspect.cleandoc(section.__doc__ or ""), rows
    for name, below in inner.items():
        named = f"{name}.{ANY_NAME}" if is_dict(types[name]) else name
        yield from _sections(below, f"{prefix}{named}.")


def _value(section: type, name: str) -> str:
    """Return what a value must be: its type, then what its rules say."""
    kind = field_types(section)[name]
    words = describe(kind)
    for rule in field_rules(section).get(name, ()):
        if isinstance(rule, AtLeast | Above | Fraction | Probability | Percent | Bits):
            words += f", {rule.description}"
        elif isinstance(rule, Names):
            words += f", each name {rule.description}"
        elif not isinstance(rule, Required):
            words += f", each {rule.description}" if is_list(kind) or is_dict(kind) else f": {rule.description}"
    return words


def _default(section: type, item: dataclasses.Field[object]) -> str:
    kind: FieldType = field_types(section)[item.name]
    if any(isinstance(rule, Required) for rule in field_rules(section).get(item.name, ())):
        return "required"
    if is_list(kind) or is_dict(kind):
        return "empty"
    if item.default is None:
        return "unset"
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


@cache
def _class_docs(file: Path) -> Mapping[str, Mapping[str, str]]:
    """Return class -> field -> the docstring below it, on one line."""
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_field_docs(node)) for node in classes}


def _field_docs(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for item, doc in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ):
            yield item.target.id, " ".join(str(doc.value.value).split())
