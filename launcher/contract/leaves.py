"""YAML text and `key=value` overrides → leaves: dotted key, raw value and where it was written.

The YAML node tree is walked along the schema's dataclasses, so every problem has its line. Scalars stay the strings
the user wrote: OmegaConf's schema converts them later, and YAML's own guesses (`1:30:00` is 5400, `1e-5` is a string,
`no` is false) never get a say.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import yaml

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.spec import mapped_section

ANY_NAME = "NAME"
"""Stands in a dotted key for a name of the user's own."""
_SECTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
Source = Literal["default", "cluster", "file", "override", "plan"]
MOST_NODES = 1_000_000
"""A config of a few aliases can stand for more values than memory holds."""
NAMED_SECTIONS = ("cluster", "topology")
"""Sections that may be given by one word: a cluster's name, or the layout `auto`."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value somebody wrote."""

    value: Any
    source: Source
    where: str
    """`cfg.yaml:12` or `override 'a=b'`."""


@dataclass(slots=True)
class Leaves:
    """What was read so far, and every problem met."""

    values: dict[str, Leaf] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    """Keys with a problem: no value is kept, and no further rule complains about them."""
    described: Mapping[str, Any] | None = None
    """config.json of the model that a NeMo config spells out."""


@cache
def field_types(section: type) -> dict[str, Any]:
    """Field name → annotated type of a config dataclass."""
    hints = typing.get_type_hints(section)
    return {item.name: hints[item.name] for item in dataclasses.fields(section)}


def leaf_types(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every value below `section`, in schema order; ANY_NAME where the user names sections."""
    for name, kind in field_types(section).items():
        inner = mapped_section(kind)
        if inner is not None:
            yield from leaf_types(inner, f"{prefix}{name}.{ANY_NAME}.")
        elif dataclasses.is_dataclass(kind):
            yield from leaf_types(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def type_of(section: type, key: str) -> Any:
    """The type of the value at a dotted key below `section`; None where there is no such value."""
    kind: Any = section
    for name in key.split("."):
        inner = mapped_section(kind)
        if inner is not None:
            kind = inner if _SECTION_NAME.fullmatch(name) else None
        else:
            is_section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
            kind = field_types(kind).get(name) if is_section else None
    return None if dataclasses.is_dataclass(kind) or mapped_section(kind) else kind


def is_list(kind: Any) -> bool:
    """A list field."""
    return typing.get_origin(kind) is list


def is_dict(kind: Any) -> bool:
    """A name → value field."""
    return typing.get_origin(kind) is dict


def read_yaml(
    text: str, shown: str, schema: type, source: Source, named: Sequence[str] = (), others: Sequence[str] = ()
) -> Leaves:
    """Leaves of a YAML document; `shown` names the file in messages.

    `named` are sections that may be given by a name instead of a mapping, `others` those that are not of this schema.
    ConfigError where the text is not YAML.
    """
    leaves = Leaves()
    node = compose(text, shown)
    if node is not None and not isinstance(node, yaml.MappingNode) and not _is_null(node):
        line = node.start_mark.line + 1
        raise ConfigError(f"{shown}:{line}: the document must be a mapping (key: value lines), not {_kind(node)}")
    if node is not None:
        _Walk(leaves, shown, source, tuple(named), tuple(others)).section(node, schema, "")
    return leaves


def compose(text: str, shown: str) -> yaml.Node | None:
    """The node tree of a YAML document, small enough to be walked; ConfigError where it is not, or is not YAML."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _nodes(node, {}) > MOST_NODES:
            raise ConfigError(f"{shown}: more than {MOST_NODES:,} values, with every *alias written out")
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(error, shown)) from None
    except RecursionError:
        raise ConfigError(f"{shown}: nested too deep, or an *alias holds itself") from None
    return node


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a walk would meet: what is behind an alias counts each time, and is counted once."""
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = itertools.chain.from_iterable(children) if isinstance(node, yaml.MappingNode) else children
        known[id(node)] = 1 + sum(_nodes(child, known) for child in pairs)
    return known[id(node)]


def _syntax_problem(error: yaml.YAMLError, shown: str) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    line = f":{mark.line + 1}" if mark is not None else ""
    return f"{shown}{line}: not valid YAML: {f'{context}: ' if context else ''}{problem}"


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
        types = field_types(section)
        for name, key, value in self.pairs(node, prefix.rstrip(".")):
            dotted = f"{prefix}{name}"
            kind = types.get(name)
            if dotted in self.others:
                continue
            if kind is None:
                self.problem(key, f"unknown key '{dotted}'{did_you_mean(name, types)}")
            elif (inner := mapped_section(kind)) is not None:
                self.sections(value, inner, dotted)
            elif dataclasses.is_dataclass(kind) and not (dotted in self.named and isinstance(value, yaml.ScalarNode)):
                self.section(value, typing.cast(type, kind), f"{dotted}.")
            else:
                self.leaf(key, value, kind, dotted)

    def sections(self, node: yaml.Node, section: type, prefix: str) -> None:
        """Sections below names of the user's own."""
        if _is_null(node):
            return
        for name, key, value in self.pairs(node, prefix):
            if not _SECTION_NAME.fullmatch(name):
                self.problem(key, f"{prefix}: {name!r} is not a name: letters, digits, '_', '-', first a letter")
            elif _is_null(value) or (isinstance(value, yaml.MappingNode) and not value.value):
                self.problem(key, f"{prefix}.{name} is empty; it needs {next(iter(field_types(section)))}")
            else:
                self.section(value, section, f"{prefix}.{name}.")

    def leaf(self, key: yaml.Node, node: yaml.Node, kind: Any, dotted: str) -> None:
        before = len(self.leaves.problems)
        value = self.plain(node, kind, dotted)
        if len(self.leaves.problems) > before:
            self.leaves.bad.add(dotted)
        else:
            self.leaves.values[dotted] = Leaf(value, self.source, self.where(key))

    def pairs(self, node: yaml.Node, dotted: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Key name, key node and value node of a mapping; a key given twice is a problem."""
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

    def plain(self, node: yaml.Node, kind: Any, dotted: str) -> Any:
        """The node as None, text, list of texts or dict of texts."""
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


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "null" if _is_null(node) else repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def describe(kind: Any) -> str:
    """What a value must be, in words that fit after `is not`."""
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if is_list(kind):
        return "a list of strings"
    if is_dict(kind):
        return "a mapping of names to strings"
    if typing.get_origin(kind) is typing.Union:
        return describe(arguments[0])
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]


def read_overrides(overrides: Sequence[str], schema: type) -> Leaves:
    """Leaves of `key=value` words; later ones win."""
    leaves = Leaves()
    for word in overrides:
        where = f"override {word!r}"
        key, equals, text = word.partition("=")
        if not equals or not key:
            leaves.problems.append(f"{where}: expected key=value")
            continue
        parent, _, entry = key.rpartition(".")
        kind = str if key in NAMED_SECTIONS else type_of(schema, key)
        if kind is not None:
            try:
                leaves.values[key] = Leaf(_override_value(text, kind), "override", where)
            except _NotThatType as error:
                leaves.problems.append(f"{where}: {error}")
                leaves.bad.add(key)
        elif is_dict(type_of(schema, parent)):
            before = leaves.values.get(f"{parent}.")
            merged = {**(before.value if before else {}), entry: text}
            leaves.values[f"{parent}."] = Leaf(merged, "override", where)  # the dot: entries, not the whole
        else:
            leaves.problems.append(f"{where}: {_unknown(key, schema)}")
    return leaves


class _NotThatType(ValueError):
    """An override's text cannot be what its key wants."""


def _override_value(text: str, kind: Any) -> Any:
    if text in ("", "null"):
        return None
    if not is_list(kind) and not is_dict(kind):
        return text
    if is_list(kind) and not text.startswith("["):
        return [text]
    read = Leaves()
    try:
        node = compose(text, "")
        value = _Walk(read, "", "override", ()).plain(node, kind, "") if node is not None else None
    except ConfigError:
        raise _NotThatType(f"{text!r} is not valid YAML") from None
    if read.problems:
        raise _NotThatType(f"{text!r} is not {describe(kind)}")
    return value


def _unknown(key: str, schema: type) -> str:
    types = [_filled(name, key) for name, _ in leaf_types(schema)]
    inside = [name for name in types if name.startswith(f"{key}.")]
    if inside:
        return f"'{key}' is a section; set one of {', '.join(inside)}"
    return f"unknown key '{key}'{did_you_mean(key, types)}"


def _filled(known: str, key: str) -> str:
    """The known key with the names that `key` has where ANY_NAME stands."""
    names = key.split(".")
    words = enumerate(known.split("."))
    return ".".join(names[at] if word == ANY_NAME and at < len(names) else word for at, word in words)
