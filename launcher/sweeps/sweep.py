"""The `sweep` section of a config → points: one list of `key=value` overrides for each run of a group.

    sweep:
      product: {train.optimizer.lr: [1e-5, 2e-5], train.seed: [1, 2]}   # every combination
      zip: {model.path: [a, b], topology.tensor_parallel: [1, 2]}       # first with first, second with second
      list: [{data.packing: true}, {}]                                  # as written
      max_at_once: 4
      as: array                                                         # one sbatch for all; default: runs

Given together they multiply. Values are read like overrides on the command line, so they are typed and checked by the
same schema, and a point is a run that a person could have submitted by hand.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from launcher.contract.config.text import read_text
from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.yaml_document import check_keys, compose

Point = tuple[tuple[str, str], ...]
"""Dotted key and value as text, in the order of the file."""

MOST_POINTS = 10_000

_KEYS = ("product", "zip", "list", "max_at_once", "as")
_NOT_SWEPT = ("name", "run_root", "cluster")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What to run."""

    points: tuple[Point, ...]
    max_at_once: int | None = None
    """How many runs may be active at the same time; None for no limit."""
    array: bool = False
    """Submit job arrays instead of a job for each run."""


def read_sweep(path: Path) -> Sweep | None:
    """Return the sweep in a config file, or None. Raise ConfigError with every problem of the section."""
    text = read_text(path)
    if "sweep" not in text:
        return None
    check_keys(text, str(path))
    document = compose(text, str(path))
    pairs = document.value if isinstance(document, yaml.MappingNode) else []
    node = next((value for key, value in pairs if key.value == "sweep"), None)
    return None if node is None else _Reader(str(path), []).sweep(node)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the section and collects its problems."""

    shown: str
    problems: list[str]

    def problem(self, node: yaml.Node, message: str) -> None:
        self.problems.append(f"{self.shown}:{node.start_mark.line + 1}: sweep{message}")

    def sweep(self, node: yaml.Node) -> Sweep:
        parts = dict(self.mapping(node, ""))
        for name in parts.keys() - set(_KEYS):
            self.problem(parts[name], f": unknown key {name!r}{did_you_mean(name, _KEYS)}")
        factors = [
            list(itertools.islice(factor, MOST_POINTS + 1))
            for factor in (
                self.product(parts["product"]) if "product" in parts else iter([()]),
                self.zip(parts["zip"]) if "zip" in parts else iter([()]),
                self.list(parts["list"]) if "list" in parts else iter([()]),
            )
        ]
        points = list(itertools.islice(itertools.product(*factors), MOST_POINTS + 1))
        if not self.problems and (len(points) > MOST_POINTS or not parts.keys() & {"product", "zip", "list"}):
            many = f"more than {MOST_POINTS}" if len(points) > MOST_POINTS else "no"
            self.problem(node, f": {many} points; give product, zip or list, of at most {MOST_POINTS} points together")
        at_once = self.count(parts["max_at_once"]) if "max_at_once" in parts else None
        array = "as" in parts and self.is_array(parts["as"])
        chained = tuple(tuple(itertools.chain(*point)) for point in points)
        for key in dict.fromkeys(key for point in chained for key in _doubled(point)):
            self.problem(node, f": {key} is set by two of product, zip and list, and one would win; name it in one")
        if self.problems:
            raise ConfigError(self.problems)
        return Sweep(points=chained, max_at_once=at_once, array=array)

    def product(self, node: yaml.Node) -> Iterator[Point]:
        keys, columns = self.columns(node, ".product")
        for values in itertools.product(*columns):
            yield tuple(zip(keys, values, strict=True))

    def zip(self, node: yaml.Node) -> Iterator[Point]:
        keys, columns = self.columns(node, ".zip")
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            counts = ", ".join(f"{key} {length}" for key, length in zip(keys, lengths, strict=True))
            self.problem(node, f".zip: lists of one length are zipped, and these have {counts} values")
            return
        for values in zip(*columns, strict=True):
            yield tuple(zip(keys, values, strict=True))

    def list(self, node: yaml.Node) -> Iterator[Point]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.problem(node, ".list: not a list of mappings from keys to values")
            return
        for item in node.value:
            yield tuple((key, _text(value)) for key, value in self.mapping(item, ".list"))

    def columns(self, node: yaml.Node, where: str) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        keys, columns = [], []
        for key, value in self.mapping(node, where):
            if not isinstance(value, yaml.SequenceNode) or not value.value:
                self.problem(value, f"{where}: {key} is not a list of values")
                continue
            keys.append(key)
            columns.append([_text(item) for item in value.value])
        return keys, columns

    def mapping(self, node: yaml.Node, where: str) -> Iterator[tuple[str, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, f"{where}: not a mapping")
            return
        for key, value in node.value:
            name = str(key.value)
            if where and (name in _NOT_SWEPT or name.startswith("cluster.")):
                self.problem(key, f"{where}: {name} is the same for all runs of a sweep; set it outside")
                continue
            yield name, value

    def is_array(self, node: yaml.Node) -> bool:
        if not isinstance(node, yaml.ScalarNode) or node.value not in ("runs", "array"):
            self.problem(node, ".as: not one of runs, array")
        return bool(node.value == "array")

    def count(self, node: yaml.Node) -> int | None:
        text = str(node.value)
        if not isinstance(node, yaml.ScalarNode) or not text.isdecimal() or int(text) < 1:
            self.problem(node, ".max_at_once: not a number of runs, at least 1")
            return None
        return int(text)


def _doubled(point: Point) -> list[str]:
    return [key for key, times in Counter(key for key, _ in point).items() if times > 1]


def _text(node: yaml.Node) -> str:
    """Return the value as on the command line. Scalars stay as they were written."""
    if isinstance(node, yaml.ScalarNode):
        return "" if node.tag == "tag:yaml.org,2002:null" else str(node.value)
    return yaml.serialize(_flow(node), width=1 << 30, Dumper=yaml.SafeDumper).strip()


def _flow(node: yaml.Node) -> yaml.Node:
    """Return the node in flow style, for a single line."""
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_flow(item) for item in node.value], flow_style=True)
    if isinstance(node, yaml.MappingNode):
        pairs = [(_flow(key), _flow(value)) for key, value in node.value]
        return yaml.MappingNode(node.tag, pairs, flow_style=True)
    return yaml.ScalarNode(node.tag, node.value, style='"')
