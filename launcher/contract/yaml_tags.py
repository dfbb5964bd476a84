"""Tags of a YAML document: those that say what a value is, and is. No other one is read, so each is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import yaml

_STANDARD = "tag:yaml.org,2002:"
_RESOLVER = yaml.SafeLoader("")
_CHECKED = tuple(f"{_STANDARD}{name}" for name in ("bool", "float", "int"))
"""Tags that may stand before a text that would be something else without them, if it is one."""


def tag_problem(document: yaml.Node) -> tuple[int, str] | None:
    """Return the line, counted from 1, of the first tag that is not read and why, or None."""
    for node in _nodes(document, set()):
        if not _is_true(node):
            return node.start_mark.line + 1, _why(node)
    return None


def _nodes(node: yaml.Node, seen: set[int]) -> Iterator[yaml.Node]:
    """Yield a node and all below it in their order, those behind aliases once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    yield node
    for child in children(node):
        yield from _nodes(child, seen)


def children(node: yaml.Node) -> Iterable[yaml.Node]:
    """Return what a node holds: items, or keys and values in turn."""
    inside = node.value if isinstance(node, yaml.CollectionNode) else ()
    return itertools.chain.from_iterable(inside) if isinstance(node, yaml.MappingNode) else inside


def _is_true(node: yaml.Node) -> bool:
    """Return whether a node's tag is the one that it has without any, or says as much of its text."""
    if not isinstance(node, yaml.ScalarNode):
        return bool(node.tag == _STANDARD + ("map" if isinstance(node, yaml.MappingNode) else "seq"))
    plain: str = _RESOLVER.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
    if node.tag in (f"{_STANDARD}str", plain):
        return True
    if node.tag not in _CHECKED:
        return False
    try:
        yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, KeyError, IndexError):
        return False
    return True


def _why(node: yaml.Node) -> str:
    tag = node.tag.replace(_STANDARD, "!!", 1)
    value = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
    if node.tag in (*_CHECKED, f"{_STANDARD}null"):
        return f"{tag} says what {value} is not; correct the value, or remove the tag"
    return f"the tag {tag} means nothing in a config, and {value} would be read without it; remove it"
