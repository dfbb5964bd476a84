"""YAML text -> a tree of nodes, of a size that can be walked, without tags that nothing reads."""

from __future__ import annotations

import re

import yaml

from launcher.contract.errors import ConfigError
from launcher.contract.yaml_tags import children, tag_problem

MOST_ITEMS = 20_000
"""Items of a list; OmegaConf takes a third of a millisecond for each, and YAML as much on every rank."""
WHY_FEW = "since each rank reads the list; join files into fewer, larger ones"

_MOST_SEPARATORS = 5 * MOST_ITEMS
"""Lines and commas of a text, which are counted at once; PyYAML takes a minute for a list of a million items."""

_MOST_KEYS = 10_000
"""Keys of a text that a person wrote; PyYAML takes a second for so many."""
_KEY = re.compile(r"(?<=[\"']):|:(?=[\s\[{])")

MOST_NODES = 1_000_000
"""A config of a few aliases can stand for more values than memory holds."""


def compose(text: str, shown: str) -> yaml.Node | None:
    """Return the node tree of a YAML document, or None for an empty one.

    Raise ConfigError where the text is not YAML, has a tag that nothing reads, or the tree is too large to be walked.
    """
    lines, commas = text.count("\n"), text.count(",")
    if lines + commas > _MOST_SEPARATORS:
        raise ConfigError(
            f"{shown}: {lines:,} lines with {commas:,} commas, and at most {_MOST_SEPARATORS:,} of both are read: a "
            f"list has at most {MOST_ITEMS:,} items, {WHY_FEW}"
        )
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _nodes(node, {}) > MOST_NODES:
            raise ConfigError(f"{shown}: more than {MOST_NODES:,} values, with every *alias written out")
    except yaml.YAMLError as error:
        raise ConfigError(syntax_problem(error, shown)) from None
    except RecursionError:
        raise ConfigError(f"{shown}: nested too deep, or an *alias holds itself") from None
    problem = None if node is None else tag_problem(node)
    if problem is not None:
        raise ConfigError(f"{shown}:{problem[0]}: {problem[1]}")
    return node


def check_keys(text: str, shown: str) -> None:
    """Raise ConfigError where a text has more keys than a person writes, as a data file has, before it is read."""
    keys = sum(1 for _ in _KEY.finditer(text))
    if keys > _MOST_KEYS:
        raise ConfigError(f"{shown}: {keys:,} keys, and at most {_MOST_KEYS:,} are read; is this the config of a run?")


def top_level_keys(text: str, shown: str) -> set[str]:
    """Return the keys of a YAML mapping, none where the text is something else. Raise ConfigError as `compose` does."""
    node = compose(text, shown)
    if not isinstance(node, yaml.MappingNode):
        return set()
    return {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes a walk would meet, those behind an alias each time.

    `known` holds the counts of nodes met before.
    """
    if id(node) not in known:
        known[id(node)] = 1 + sum(_nodes(child, known) for child in children(node))
    return known[id(node)]


def syntax_problem(error: yaml.YAMLError, shown: str) -> str:
    """Return what is wrong with a text, behind its file and line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    line = f":{mark.line + 1}" if mark is not None else ""
    return f"{shown}{line}: not valid YAML: {f'{context}: ' if context else ''}{problem}"
