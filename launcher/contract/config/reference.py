"""Write docs/config.md from the docstrings under the fields of the config: one text, no second copy to go stale."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from launcher.contract import spec
from launcher.contract.leaves import ANY_NAME, describe, field_types, is_dict, is_list
from launcher.contract.spec import RunSpec, mapped_section

_INTRO = """# Config reference

Every key of a run's YAML file. `launcher reference` prints this page from the source.
Any key can be set on the command line too: `launcher submit cfg.yaml train.max_steps=100`.
"""


def config_reference() -> str:
    """The whole page."""
    docs = _field_docs()
    return _INTRO + "".join(_sections(RunSpec, "", docs))


def _sections(section: type, prefix: str, docs: dict[str, dict[str, str]]) -> Iterator[str]:
    """This section's table, then those of its subsections."""
    types = field_types(section)
    fields = {item.name: item for item in dataclasses.fields(section)}
    inner = {name: below for name, kind in types.items() if (below := _inner(kind)) is not None}
    leaves = {name: kind for name, kind in types.items() if name not in inner}
    title = prefix.rstrip(".") or "top level"
    about = (section.__doc__ or "").partition("\n")[0]
    yield f"\n## {title}\n\n{about}\n\n| key | value | default | meaning |\n|---|---|---|---|\n"
    for name, kind in leaves.items():
        meaning = docs[section.__name__][name].replace("|", "\\|")
        yield f"| `{prefix}{name}` | {describe(kind)} | {_default(fields[name], kind)} | {meaning} |\n"
    for name, below in inner.items():
        named = f"{name}.{ANY_NAME}" if is_dict(types[name]) else name
        yield from _sections(below, f"{prefix}{named}.", docs)


def _inner(kind: Any) -> type | None:
    """The section that a field holds, or maps names to."""
    return cast(type, kind) if dataclasses.is_dataclass(kind) else mapped_section(kind)


def _default(item: dataclasses.Field[Any], kind: Any) -> str:
    if is_list(kind) or is_dict(kind):
        return "empty"
    if item.default is None:
        return "unset"
    if item.default == "":
        return "required"
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


def _field_docs() -> dict[str, dict[str, str]]:
    """Class → field → the docstring below it, on one line."""
    tree = ast.parse(Path(spec.__file__).read_text(encoding="utf-8"))
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            found[node.name] = {
                item.target.id: " ".join(str(doc.value.value).split())
                for item, doc in pairs
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
            }
    return found
