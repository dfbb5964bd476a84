"""`key=value` words of the command line -> leaves."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.contract.config.yaml_leaves import SECTION_NAME, plain_value, unknown_hint
from launcher.contract.errors import ConfigError
from launcher.contract.leaves import NAMED_SECTIONS, Leaf, Leaves, describe, is_dict, is_list
from launcher.contract.spec.fields import ANY_NAME, FieldType, field_types, leaf_types, mapped_section, section_type
from launcher.contract.yaml_document import compose


def read_overrides(overrides: Sequence[str], schema: type) -> Leaves:
    """Return the leaves of `key=value` words, of which later ones win.

    A word for one entry of a mapping (`cluster.env.A=b`) becomes a leaf of `cluster.env.`: the dot says that its
    entries join those of the layers below instead of replacing them.
    """
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
            entries = {**(before.entries if before else {}), entry: text}
            leaves.values[f"{parent}."] = Leaf(entries, "override", where)
        else:
            leaves.problems.append(f"{where}: {_unknown(key, schema)}")
    return leaves


class _NotThatType(ValueError):
    """The text of an override is not of its key's type."""


def _override_value(text: str, kind: FieldType) -> object:
    if text in ("", "null"):
        return None
    if not is_list(kind) and not is_dict(kind):
        return text
    if is_list(kind) and not text.startswith("["):
        return [text]
    try:
        node = compose(text, "")
    except ConfigError:
        raise _NotThatType(f"{text!r} is not valid YAML") from None
    value, fits = plain_value(node, kind) if node is not None else (None, True)
    if not fits:
        raise _NotThatType(f"{text!r} is not {describe(kind)}")
    return value


def type_of(section: type, key: str) -> FieldType | None:
    """Return the type of the value at a dotted key below `section`, or None where there is no such value."""
    kind: FieldType | None = section
    for name in key.split("."):
        mapped, inner = mapped_section(kind), section_type(kind)
        if mapped is not None:
            kind = mapped if SECTION_NAME.fullmatch(name) else None
        else:
            kind = field_types(inner).get(name) if inner is not None else None
    return None if section_type(kind) or mapped_section(kind) else kind


def _unknown(key: str, schema: type) -> str:
    types = [_filled(name, key) for name, _ in leaf_types(schema)]
    inside = [name for name in types if name.startswith(f"{key}.")]
    if inside:
        return f"'{key}' is a section; set one of {', '.join(inside)}"
    return f"unknown key '{key}'{unknown_hint(key, key, types)}"


def _filled(known: str, key: str) -> str:
    """Return the known key with the names of `key` in place of ANY_NAME."""
    names = key.split(".")
    words = enumerate(known.split("."))
    return ".".join(names[at] if word == ANY_NAME and at < len(names) else word for at, word in words)
