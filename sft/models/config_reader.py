"""Read the keys of a Hugging Face config and collect everything in it that is not covered.

A setting that is skipped over (a bias, a sliding window, a scaled RoPE) trains without any error, on another model than
the one that is exported. So families ask for each key that matters, and all problems are reported together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from launcher.contract.model_shape import ModelShape

T = TypeVar("T")


class ConfigReader:
    """The values of one config.json, its sizes, and the problems found so far."""

    def __init__(self, values: Mapping[str, object], shape: ModelShape) -> None:
        self.values = values
        self.shape = shape
        self.problems: list[str] = []
        self.asked: set[str] = set()
        """Keys that the family has asked for by the methods below."""

    def refuse(self, problem: str) -> None:
        """Note something that is not covered."""
        self.problems.append(problem)

    def require(self, *keys: str) -> None:
        """Refuse a config that leaves out one of `keys`, because the family's default is not what we assume."""
        for key in keys:
            if key not in self.values:
                self.refuse(f"no {key}, which a {self.shape.model_type} config must state")

    def refuse_true(self, *keys: str) -> None:
        """Refuse a config that switches one of `keys` on."""
        self.asked.update(keys)
        for key in keys:
            if self.values.get(key):
                self.refuse(f"{key} true is not supported")

    def choice(self, key: str, covered: Mapping[str, T]) -> T:
        """Return what the value of `key` means. The first of `covered` is the default."""
        self.asked.add(key)
        default = next(iter(covered))
        value = self.values.get(key, default)
        if isinstance(value, str) and value in covered:
            return covered[value]
        self.refuse(f"{key} {value!r} is not supported; only {' or '.join(map(repr, covered))}")
        return covered[default]

    def number(self, key: str, default: float) -> float:
        """Return the number under `key`, or the default where it is left out."""
        self.asked.add(key)
        value = self.values.get(key, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        self.refuse(f"{key} {value!r} is not a number")
        return default

    def positive(self, key: str, default: float) -> float:
        """Return the number under `key`, which must be above 0."""
        value = self.number(key, default)
        if value > 0:
            return value
        self.refuse(f"{key} {value:g} is not above 0")
        return default

    def not_negative(self, key: str, default: float) -> float:
        """Return the number under `key`, which may be 0: an epsilon below it makes roots of negative numbers."""
        value = self.number(key, default)
        if value >= 0:
            return value
        self.refuse(f"{key} {value:g} is below 0")
        return default

    def count(self, key: str, default: int) -> int:
        """Return the whole number under `key`, which must be above 0."""
        value = self.positive(key, default)
        if float(value).is_integer():  # an int, the default, has that method from Python 3.12 on
            return int(value)
        self.refuse(f"{key} {value:g} is not a whole number")
        return default

    def softcap(self, key: str, default: float | None) -> float | None:
        """Return the bound under `key` that a tanh keeps numbers within, None where there is none."""
        if self.values.get(key, default) is None:
            return None
        return self.positive(key, 1.0 if default is None else default)

    def flag(self, key: str, *, default: bool) -> bool:
        """Return whether `key` is on."""
        self.asked.add(key)
        return bool(self.values.get(key, default))

    def list_by_layer(self, key: str) -> list[object] | None:
        """Return the list under `key`, which has an entry for each layer, if there is one."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < self.shape.num_layers:
            self.refuse(f"{key} is not a list with an entry for each of the {self.shape.num_layers} layers")
            return None
        return value[: self.shape.num_layers]
