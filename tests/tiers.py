"""Which cases of a grid run by default: the others are in the slow tier, so that the default run stays short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(names: Iterable[str], *by_default: str) -> list[Any]:
    """Return every name as a parameter, all but `by_default` marked slow."""
    names = list(names)
    assert set(by_default) <= set(names), by_default
    return [name if name in by_default else pytest.param(name, marks=pytest.mark.slow) for name in names]
