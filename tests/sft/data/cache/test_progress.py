"""A bar on a terminal, lines in a log."""

from __future__ import annotations

import sys

import pytest

from sft.data.cache import progress
from sft.data.cache.progress import Progress


def test_a_log_gets_lines_and_no_carriage_returns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail with the bar written into the log."""
    clock = iter([100.0, 104.0, 111.0, 112.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("tokenizing train", 4_000_000, shown=True) as shown:
        for _ in range(3):
            shown.advance(1_000_000)
    assert capsys.readouterr().err == "tokenizing train: 50 % of 4 MB, 0.2 MB/s, 11 s left\n"


def test_a_quick_step_and_a_hidden_one_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with Progress("tokenizing train", 10, shown=shown) as bar:
            bar.advance(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("tokenizing train", 10, shown=True) as bar:
        bar.advance(10)
    err = capsys.readouterr().err
    assert "\r" in err
    assert "tokenizing train: 100%" in err
