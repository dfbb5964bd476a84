"""Leaves -> a typed RunSpec, by OmegaConf's structured schema.

`${...}` interpolation is done on the merged layers. Then all values are converted at once, which is quick; only where
one does not fit are they tried one by one, so that every problem is reported with the line it was written on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Literal, TypeVar, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from launcher.contract.config.overrides import type_of
from launcher.contract.errors import did_you_mean
from launcher.contract.leaves import Leaf, Leaves, describe
from launcher.contract.secret_names import is_secret_name
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import FieldType
from launcher.contract.yaml_document import MOST_ITEMS, WHY_FEW

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([^}\s,'\"]*)")
_BARE_NAME = re.compile(r"\$\{\s*([A-Za-z_]\w*)\s*\}")

Section = TypeVar("Section")


def typed_spec(merged: Leaves) -> RunSpec:
    """Return the leaves as a RunSpec.

    A value that does not fit its type is reported in `merged` and left at its default.
    """
    schema = schema_of(RunSpec)
    for key in list(merged.values):
        problem = _forbidden(merged.values[key])
        if problem is not None:
            merged.reject(key, problem)
    with contextlib.suppress(OmegaConfBaseException, TypeError):  # TypeError: a list in place of a mapping
        leaves = _interpolated(schema, merged.values)
        if all(_holds_texts(leaf.value) for leaf in leaves.values()):
            return build(RunSpec, schema, leaves)
    return build(RunSpec, schema, _fitting(schema, _untyped(schema, merged.values), merged))


def schema_of(section: type) -> DictConfig:
    """Return OmegaConf's schema of a config dataclass."""
    return cast(DictConfig, OmegaConf.structured(section))


def build(section: type[Section], schema: DictConfig, leaves: Mapping[str, Leaf]) -> Section:
    """Return an instance of `section` with these values.

    Raise OmegaConf's error where one does not fit.
    """
    return cast(Section, OmegaConf.to_object(OmegaConf.merge(schema, _nested(leaves))))


def literal(value: object) -> object:
    """Return the value with every `${` escaped: it is text, and not to be interpolated (again)."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, dict):
        return {name: literal(item) for name, item in value.items()}
    return value


def _interpolated(schema: DictConfig, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
    """Return the leaves with their interpolations done.

    Most configs have none, and then no second tree is built.
    """
    if not any("${" in text for leaf in leaves.values() for text in leaf.texts):
        return leaves
    raw = _untyped(schema, leaves)
    return {key: dataclasses.replace(leaf, value=_resolved(raw, key)) for key, leaf in leaves.items()}


def _untyped(schema: DictConfig, leaves: Mapping[str, Leaf]) -> DictConfig:
    """Return defaults and leaves in one tree that refuses no type, for interpolations to be looked up in."""
    return cast(DictConfig, OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(schema)), _nested(leaves)))


def _fitting(schema: DictConfig, raw: DictConfig, merged: Leaves) -> dict[str, Leaf]:
    """Return the leaves that resolve and fit their type, and reject each of the others."""
    fitting = {}
    for key, leaf in list(merged.values.items()):
        try:
            resolved = dataclasses.replace(leaf, value=_resolved(raw, key))
            OmegaConf.merge(schema, _nested({key: resolved}))
            if not _holds_texts(resolved.value):
                raise ValidationError
            fitting[key] = resolved
        except (ValidationError, TypeError):
            merged.reject(key, not_a(leaf.value, type_of(RunSpec, key)))
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            merged.reject(key, f"{leaf.value!r} does not resolve: {reason}{_variable_hint(leaf)}")
    return fitting


def _variable_hint(leaf: Leaf) -> str:
    """Return how to write the environment variable that an interpolation seems to mean, or an empty text."""
    meant = (name for text in leaf.texts for name in _BARE_NAME.findall(text) if name in os.environ or name.isupper())
    name = next(meant, None)
    return "" if name is None else f"; an environment variable is ${{oc.env:{name}}}"


def _holds_texts(value: object) -> bool:
    """Return whether a list or mapping holds nothing but texts: an interpolation can put a list into a list."""
    items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return all(isinstance(item, str | int | float) for item in items)


def _forbidden(leaf: Leaf) -> str | None:
    """Return why OmegaConf must not see this value, or None."""
    if isinstance(leaf.value, list) and len(leaf.value) > MOST_ITEMS:
        return f"{len(leaf.value):,} items, and at most {MOST_ITEMS:,} are read, {WHY_FEW}"
    for text in leaf.texts:
        if text == "???":
            return "'???' stands for a missing value; set it"
        if "${" not in text:
            continue
        try:
            OmegaConf.create({"value": text})
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            return f"{text!r} is not a valid ${{...}} interpolation: {reason}"
        for name in _ENVIRONMENT.findall(text):
            if "$" in name or is_secret_name(name):
                return f"{name} looks like a secret, and the resolved config is stored; name it in env_from instead"
    return None


def _resolved(raw: DictConfig, key: str) -> object:
    """Return the value of `key` with its interpolations done, any `${` left in it escaped."""
    value = OmegaConf.select(raw, key, throw_on_missing=True)
    return literal(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)


def not_a(value: object, kind: FieldType) -> str:
    """Return that a value is not of its key's type, and what it may mean."""
    written = "null" if value is None else repr(value)
    choices = [str(choice) for choice in get_args(kind) if get_origin(kind) is Literal]
    return f"{written} is not {describe(kind)}{did_you_mean(str(value), choices)}"


def _nested(leaves: Mapping[str, Leaf]) -> dict[str, object]:
    """Return dotted keys as nested mappings."""
    tree: dict[str, object] = {}
    for key, leaf in leaves.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = cast(dict[str, object], node.setdefault(section, {}))
        node[name] = leaf.value
    return tree
