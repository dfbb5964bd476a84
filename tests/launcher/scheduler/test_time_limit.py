"""Time limits in Slurm's notation."""

from __future__ import annotations

import pytest

from launcher.scheduler.time_limit import time_limit_minutes


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        (None, None),
        ("UNLIMITED", None),
        ("30", 30),
        ("1:30", 1.5),
        ("01:00:00", 60),
        ("1-00", 1440),
        ("1-2:30", 1590),
        ("1-02:03:30", 1563.5),
    ],
)
def test_time_limits(text: str | None, minutes: float | None) -> None:
    assert time_limit_minutes(text) == minutes
