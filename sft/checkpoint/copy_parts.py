"""The files of copies in one node's memory: of each rank's part its data, and a description that is written last.

    sft-copies-1000-77.0-3f2a90b1c4d5-node1/
      run                           the run directory
      step-00000006.rank-00002.pt   a RankState; rank 2's own part, or that of another node's rank
      step-00000006.rank-00002.json its Part: a part without one is not whole

A part is never written over: the next copy has files of its own, and what is older goes when the newest is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.checksum import crc32
from launcher.contract.rundir import read_json

_DATA = re.compile(r"step-(?P<step>[0-9]{8,})\.rank-(?P<rank>[0-9]{5,})\.(?:pt|json)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One rank's part of a copy."""

    identity: str
    """Of the run, its layout and its data: parts of anything else are nothing to go on from."""
    attempt: str
    """The attempt that made the copy."""
    step: int
    rank: int
    bytes: int
    crc32: str


def data_path(folder: Path, step: int, rank: int) -> Path:
    """Return the file with the data of a part."""
    return folder / f"step-{step:08d}.rank-{rank:05d}.pt"


def describe(folder: Path, part: Part) -> None:
    """Write the description of a part whose data are there: from now on it counts."""
    target = _description(data_path(folder, part.step, part.rank))
    partial = target.with_suffix(".new")
    partial.write_text(json.dumps(dataclasses.asdict(part)), encoding="utf-8")
    partial.rename(target)


def parts_in(folder: Path, identity: str) -> list[Part]:
    """Return the parts of copies in a folder that have a description, and this identity. Data are not looked at."""
    found = (part for part in _described(folder) if part.identity == identity)
    return sorted(found, key=lambda part: (part.step, part.rank))


def _described(folder: Path) -> Iterator[Part]:
    for path in folder.glob("step-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            part = Part(**(read_json(path) or {}))
            numbers = (part.step, part.rank, part.bytes)
            if all(type(number) is int for number in numbers) and path == _description(
                data_path(folder, part.step, part.rank)
            ):
                yield part


def damage(folder: Path, part: Part) -> str | None:
    """Return what is wrong with the data of a part, or None if every byte is what was written."""
    path = data_path(folder, part.step, part.rank)
    try:
        size = path.stat().st_size
        found = crc32(path) if size == part.bytes else None
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found is None:
        return f"{path} has {size} bytes, written were {part.bytes}"
    return None if found == part.crc32 else f"{path} has changed: its CRC-32 is {found}, written was {part.crc32}"


def remove_part(folder: Path, step: int, rank: int) -> None:
    """Remove a part, its description first."""
    data = data_path(folder, step, rank)
    for path in (_description(data), data):
        path.unlink(missing_ok=True)


def remove_copies(folder: Path, *, but: int | None = None, before: int | None = None) -> None:
    """Remove all copies but those of step `but`, or of them only those of steps before `before`."""
    for path in folder.glob("step-*"):
        match = _DATA.fullmatch(path.name)
        step = int(match["step"]) if match else -1
        if step != but and (before is None or step < before):
            path.unlink(missing_ok=True)


def open_new(path: Path) -> int:
    """Return a descriptor of a new file that only this user can read. An older one of that name is replaced."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _description(data: Path) -> Path:
    return data.with_suffix(".json")
