"""Time limits in Slurm's notation."""

from __future__ import annotations

import pytest

from launcher.contract.time_limit import as_time_limit, time_limit_minutes


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


def test_a_time_limit_is_written_as_it_is_read() -> None:
    assert [as_time_limit(minutes) for minutes in (1.5, 60, 2880)] == ["0:01:30", "1:00:00", "48:00:00"]
    assert time_limit_minutes(as_time_limit(2880)) == 2880
