"""YAML text -> leaves.

The node tree is walked along the schema's dataclasses, so that every problem has its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import yaml

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.leaves import Leaf, Leaves, Source, describe, is_dict, is_list
from launcher.contract.spec.fields import FieldType, field_types, mapped_section, section_type
from launcher.contract.yaml_document import compose

SECTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""Names that a user may give to a section."""

_MOST_UNKNOWN = 50
"""Unknown keys of a section that are told one by one, each with what it may mean: a data file has thousands."""


def read_yaml(
    text: str, shown: str, schema: type, source: Source, named: Sequence[str] = (), others: Sequence[str] = ()
) -> Leaves:
    """Return the leaves of a YAML document.

    `shown` names the file in messages. `named` are sections that may be given by a name instead of a mapping,
    `others` those that are not of this schema. Raise ConfigError where the text is not YAML.
    """
    leaves = Leaves()
    node = compose(text, shown)
    if node is not None and not isinstance(node, yaml.MappingNode) and not _is_null(node):
        line = node.start_mark.line + 1
        raise ConfigError(f"{shown}:{line}: the document must be a mapping (key: value lines), not {_kind(node)}")
    if node is not None:
        _Walk(leaves, shown, source, tuple(named), tuple(others)).section(node, schema, "")
    return leaves


@dataclass(frozen=True, slots=True)
class _Walk:
    """One pass over a YAML document."""

    leaves: Leaves
    shown: str
    source: Source
    named: tuple[str, ...]
    others: tuple[str, ...] = ()

    def where(self, node: yaml.Node) -> str:
        return f"{self.shown}:{node.start_mark.line + 1}"

    def problem(self, node: yaml.Node, message: str) -> None:
        self.leaves.problems.append(f"{self.where(node)}: {message}")

    def section(self, node: yaml.Node, section: type, prefix: str) -> None:
        if _is_null(node):
            return  # a heading with nothing below it
        types, unknown = field_types(section), 0
        for name, key, value in self.pairs(node, prefix.rstrip(".")):
            dotted = f"{prefix}{name}"
            kind = types.get(name)
            if dotted in self.others:
                continue
            if kind is None:
                unknown += 1
                if unknown <= _MOST_UNKNOWN:
                    self.problem(key, f"unknown key '{dotted}'{unknown_hint(dotted, name, types)}")
            elif (mapped := mapped_section(kind)) is not None:
                self.sections(value, mapped, dotted)
            elif (inner := section_type(kind)) and not (dotted in self.named and isinstance(value, yaml.ScalarNode)):
                self.section(value, inner, f"{dotted}.")
            else:
                self.leaf(key, value, kind, dotted)
        if unknown > _MOST_UNKNOWN:
            more, where = unknown - _MOST_UNKNOWN, prefix.rstrip(".") or "the document"
            self.problem(node, f"{where} has {more:,} more unknown keys; is this the config of a run?")

    def sections(self, node: yaml.Node, section: type, prefix: str) -> None:
        """Walk sections below names of the user's own."""
        if _is_null(node):
            return
        for name, key, value in self.pairs(node, prefix):
            if not SECTION_NAME.fullmatch(name):
                self.problem(key, f"{prefix}: {name!r} is not a name: letters, digits, '_', '-', first a letter")
            elif _is_null(value) or (isinstance(value, yaml.MappingNode) and not value.value):
                self.problem(key, f"{prefix}.{name} is empty; it needs {next(iter(field_types(section)))}")
            else:
                self.section(value, section, f"{prefix}.{name}.")

    def leaf(self, key: yaml.Node, node: yaml.Node, kind: FieldType, dotted: str) -> None:
        before = len(self.leaves.problems)
        value = self.plain(node, kind, dotted)
        if len(self.leaves.problems) > before:
            self.leaves.bad.add(dotted)
        else:
            self.leaves.values[dotted] = Leaf(value, self.source, self.where(key))

    def pairs(self, node: yaml.Node, dotted: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Yield key name, key node and value node of a mapping, and report keys given twice."""
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, f"{dotted or 'the document'} must be a mapping (key: value lines), not {_kind(node)}")
            return
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                self.problem(key, "a key must be a plain word")
                continue
            if key.value in seen:
                full = f"{dotted}.{key.value}" if dotted else key.value
                self.problem(key, f"key '{full}' is given twice; the first is on line {seen[key.value]}")
                continue
            seen[key.value] = key.start_mark.line + 1
            yield key.value, key, value

    def plain(self, node: yaml.Node, kind: FieldType, dotted: str) -> str | list[str] | dict[str, str] | None:
        """Return the node as None, text, list of texts or dict of texts."""
        if _is_null(node):
            return None
        if isinstance(node, yaml.ScalarNode):
            return [node.value] if is_list(kind) else node.value
        if isinstance(node, yaml.SequenceNode) and is_list(kind):
            return [self.item(item, f"{dotted}[{index}]") for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and is_dict(kind):
            return {name: self.item(value, f"{dotted}.{name}") for name, _, value in self.pairs(node, dotted)}
        self.problem(node, f"{dotted}: {_kind(node)} is not {describe(kind)}")
        return None

    def item(self, node: yaml.Node, dotted: str) -> str:
        if isinstance(node, yaml.ScalarNode) and not _is_null(node):
            return str(node.value)
        self.problem(node, f"{dotted}: {_kind(node)} is not a string")
        return ""


def unknown_hint(dotted: str, word: str, known: Iterable[str]) -> str:
    """Return what an unknown key may mean: another trainer's word, a key of another section, or a slip of the pen."""
    from launcher.contract.spec import RunSpec
    from launcher.contract.trainers.hints import hint, near_hint  # late: most configs need none of its tables

    return hint(dotted, RunSpec) or did_you_mean(word, known) or near_hint(dotted)


def plain_value(node: yaml.Node, kind: FieldType) -> tuple[str | list[str] | dict[str, str] | None, bool]:
    """Return a node as a value of type `kind`, and whether it is one."""
    leaves = Leaves()
    value = _Walk(leaves, "", "override", ()).plain(node, kind, "")
    return value, not leaves.problems


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "null" if _is_null(node) else repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
