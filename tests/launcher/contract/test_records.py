"""Records that a crash, a full disk or a copy has damaged are left out, and harm no others."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from launcher.contract.records import read_events, read_metrics, read_progress
from launcher.contract.rundir import RunPaths, append_event, append_line, read_lines

DAMAGED = (
    "",
    "{}",
    "[]",
    "5",
    "null",
    '"text"',
    '{"event": "cut sh',
    "[" * 100_000,
    '{"event": "x", "time": ' + "1" * 5_000 + "}",
    '{"event": "x", "time": null}',
    '{"event": "x", "time": "now"}',
    '{"event": "x", "time": 1e300}',
    '{"event": "x", "time": NaN}',
    '{"event": "x", "time": true}',
    '{"event": 5, "time": 1.0}',
    '{"time": 1.0}',
    '{"step": null, "loss": 1.0}',
    '{"step": "3", "loss": 1.0}',
    '{"step": 2.5, "loss": 1.0}',
    '{"loss": 1.0}',
    '{"step": ' + "1" * 400 + "}",
    "\x00\x00\x00",
    "\udcff",
)


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for file in (paths.events, paths.metrics):
        with file.open("w", encoding="utf-8", errors="surrogateescape") as lines:
            for line in DAMAGED:
                lines.write(f"{line}\n")
            lines.write('{"time": 5.0, "event": "whole", "step": 7}\n')
            lines.write('{"step": 8, "loss": NaN, "note": "text", "eval_loss": 2}\n')
    assert read_events(paths) == [{"time": 5.0, "event": "whole", "step": 7}]
    first, second = read_metrics(paths)
    assert (first, second.keys()) == ({"time": 5.0, "step": 7}, {"step", "loss", "eval_loss"})
    assert math.isnan(second["loss"])


def test_an_event_behind_a_torn_line_is_read(tmp_path: Path) -> None:
    """It was seen to be glued to the torn line and lost with it."""
    paths = RunPaths(tmp_path)
    append_event(paths, "first")
    with paths.events.open("a") as file:
        file.write('{"time": 1.0, "event": "to')
    append_event(paths, "second")
    assert [event["event"] for event in read_events(paths)] == ["first", "second"]
    assert paths.events.read_text().count("\n") == 3
    with paths.events.open("a") as file:  # as the shell of the batch script appends
        file.write('{"time": 1.0, "event": "to' + '{"time": 2.0, "event": "third"}\n')
    assert [event["event"] for event in read_events(paths)] == ["first", "second", "third"]


def test_a_record_with_half_a_surrogate_is_written(tmp_path: Path) -> None:
    """A file name with other bytes than UTF-8, in the message of an error."""
    append_line(tmp_path / "a.jsonl", {"message": os.fsdecode(b"caf\xe9")})
    assert [record["message"] for record in read_lines(tmp_path / "a.jsonl")] == ["caf\udce9"]


def test_a_full_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that was cut short was seen to pass for a whole one."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
    with pytest.raises(OSError, match="No space left on device"):
        append_line(tmp_path / "a.jsonl", {"step": 1, "loss": 2.0})


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000, '{"step": ' + "1" * 5_000 + "}", "\x00"])
def test_progress_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    RunPaths(tmp_path).progress.write_text(text)
    assert read_progress(RunPaths(tmp_path)) == {}


def test_progress_has_numbers_and_the_two_texts(tmp_path: Path) -> None:
    values = {"step": 3, "loss": "1.0", "max_steps": None, "checkpoint": 7, "attempt": "local-1", "mfu": [1]}
    RunPaths(tmp_path).progress.write_text(json.dumps(values))
    assert read_progress(RunPaths(tmp_path)) == {"step": 3, "attempt": "local-1"}
