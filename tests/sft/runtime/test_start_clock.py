"""The phases between submission and first step: without gaps, and from the variables of the batch script."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from sft.runtime.start_clock import StartClock, process_began


def clock_at(*moments: float) -> StartClock:
    """A clock that begins at the first moment, and then sees the others."""
    times = iter(moments)
    return StartClock(clock=lambda: next(times))


def test_phases_add_up_to_the_whole() -> None:
    clock = clock_at(100.0, 101.5, 101.0, 104.0)
    for phase in ("imports", "data", "weights"):
        clock.end(phase)
    # A clock that goes back makes no phase negative, and nothing is counted twice.
    assert clock.phases == {"imports": 1.5, "data": 0.0, "weights": 2.5}


def test_a_phase_in_two_parts() -> None:
    clock = clock_at(0.0, 1.0, 3.0, 7.0)
    for phase in ("data", "weights", "data"):
        clock.end(phase)
    assert clock.phases == {"data": 5.0, "weights": 2.0}


def test_what_the_batch_script_tells() -> None:
    environ = {"SFT_BEGAN_SCRIPT": "10.5", "SFT_BEGAN_PREPARE": "11", "SFT_BEGAN_RANKS": "14.25"}
    began = process_began()
    clock = StartClock.from_environ(environ)
    assert clock.phases == {
        "script": 0.5,
        "prepare": 3.25,
        "start of ranks": pytest.approx(began - 14.25, abs=0.1),
    }
    of_an_earlier_start = {**environ, "SFT_BEGAN_PREFLIGHT": "9"}
    assert list(StartClock.from_environ(of_an_earlier_start).phases) == ["script", "prepare", "start of ranks"]
    assert list(StartClock.from_environ({**environ, "SFT_BEGAN_PREFLIGHT": "12"}).phases) == [
        "script",
        "prepare",
        "preflight",
        "start of ranks",
    ]


def test_queue_is_measured_from_the_last_submission_or_end() -> None:
    def queue(*events: tuple[str, float, str]) -> float:
        clock = StartClock(50.0, clock=lambda: 51.0)
        clock.end("script")
        records = [{"event": name, "time": at, "attempt": attempt} for name, at, attempt in events]
        return clock.with_queue(records, "7.1")["queue"]

    submitted = ("submitted", 20.0, "")
    assert queue(submitted) == 30.0
    assert queue(submitted, ("attempt_started", 21.0, "7.0"), ("attempt_ended", 45.0, "7.0")) == 5.0
    assert queue(submitted, ("attempt_ended", 55.0, "7.1")) == 30.0  # its own
    assert queue(("submitted", 50.5, "")) == 0.0  # written down after the script began
    assert queue() == 0.0


def test_by_hand_nothing_has_waited() -> None:
    clock = StartClock.from_environ({})
    clock.end("imports")
    assert list(clock.with_queue([{"event": "submitted", "time": 1.0}], "by-hand")) == ["imports"]


def test_begin_of_a_process() -> None:
    before = time.time()
    code = "import time; time.sleep(0.3); from sft.runtime.start_clock import process_began; print(process_began())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert before - 0.1 <= float(told.stdout) < time.time() - 0.3
