"""Read a NeMo YAML file into dotted keys, with resolved values and the lines they were written on."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launcher.contract.errors import ConfigError
from launcher.contract.nemo.entries import Entry
from launcher.contract.secret_names import is_secret_name
from launcher.contract.yaml_document import compose, syntax_problem

_RESOLVERS: dict[str, Callable[..., object]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "int_div": operator.floordiv,
    "divide_floor": operator.floordiv,
    "divide_ceil": lambda dividend, divisor: math.ceil(dividend / divisor),
}
"""The functions that NeMo's and trlx's programs register before they read such a file."""

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*(\w+)")


def is_nemo(text: str) -> bool:
    """Return whether a YAML text is a NeMo config, which has the sections `trainer` and `model`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return False
    if not isinstance(node, yaml.MappingNode):
        return False
    return {"trainer", "model"} <= {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}


def read_document(text: str, shown: str) -> dict[str, Entry]:
    """Return the entries by dotted key, in the order of the file. Lists and empty mappings are values, `???` is None.

    `shown` is the name of the file in messages. Raise ConfigError that lists every key whose interpolation does not
    resolve, and every secret that an interpolation reads from the environment, or says why the text cannot be read.
    """
    lines = _lines(compose(text, shown))
    entries: dict[str, Entry] = {}
    problems = [
        f"{shown}: {name} looks like a secret, and the resolved config is stored; export it in your shell instead"
        for name in _ENVIRONMENT.findall(text)
        if is_secret_name(name)
    ]
    with _resolvers():
        try:
            config = OmegaConf.create(text)
        except yaml.YAMLError as error:  # e.g. a key that is written twice
            raise ConfigError(syntax_problem(error, shown)) from None
        assert isinstance(config, DictConfig)
        for key in _leaves(config):
            where = f"{shown}:{lines.get(key, 1)}"
            try:
                entries[key] = Entry(_value(config, key), where)
            except OmegaConfBaseException as error:
                reason = str(error).partition("\n")[0]
                problems.append(f"{where}: {key}: does not resolve: {reason}")
    if problems:
        raise ConfigError(problems)
    return entries


def _value(config: DictConfig, key: str) -> object:
    try:
        value = OmegaConf.select(config, key, throw_on_missing=True)
    except MissingMandatoryValue:
        return None
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of everything but sections with something in them."""
    for name in map(str, config):
        key = f"{prefix}{name}"
        plain = OmegaConf.is_interpolation(config, name) or OmegaConf.is_missing(config, name)
        node = None if plain else config[name]
        if isinstance(node, DictConfig) and len(node):
            yield from _leaves(node, f"{key}.")
        else:
            yield key


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Return the line of every dotted key, counted from 1."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            lines |= _lines(value, f"{prefix}{key.value}.")
    return lines


@contextmanager
def _resolvers() -> Iterator[None]:
    """Register NeMo's functions for one reading, so that our own configs do not know them."""
    before = {name for name in _RESOLVERS if OmegaConf.has_resolver(name)}
    # OmegaConf 2.4 has a new name for it, and warns of the old one.
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    for name, function in _RESOLVERS.items():
        register(name, function, replace=True)
    try:
        yield
    finally:
        for name in _RESOLVERS.keys() - before:
            OmegaConf.clear_resolver(name)
