"""What holds for every test: one thread a process, and the quick tier first."""

from __future__ import annotations

import os

# Before anything imports torch: tests start several ranks, and their threads would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

TIERS = ("parity", "slurm", "gpu", "slow")
"""Markers in the order in which their tests run; tests without one of them come first."""


def tier(item: pytest.Item) -> int:
    """Position of a test's slowest marker; 0 for a unit test."""
    return max((position for position, name in enumerate(TIERS, start=1) if item.get_closest_marker(name)), default=0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests, then parity, then slurm: a broken basis shows in seconds."""
    items.sort(key=tier)
