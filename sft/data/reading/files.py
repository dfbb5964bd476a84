"""Data files as bytes: which there are, what is in them (a digest), and how they are cut for workers.

A digest names the content, so that a file may be moved or copied without being tokenized again. Every rank needs the
digest to find the cache; to read a large data set on every rank would take longer than to tokenize it, so the one
that builds the cache notes digests beside it, and they hold as long as size and times of the file are the same.

Workers get byte ranges that end at line ends, with the number of their first line: memory stays flat whatever the
size of a file, and an error still names file and line.
"""

from __future__ import annotations

import glob
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from launcher.contract.errors import DataError
from launcher.contract.rundir import read_json, write_json
from sft.data.reading.tables import dataset_files, place

_BLOCK = 1 << 20
_SETTLED_SECONDS = 2.0
"""A file that was changed later than this is read again: within the clock's grain its times prove nothing."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Whole lines of a file."""

    path: Path
    start: int
    end: int
    first_line: int
    source: Optional[Path] = None
    """The data file whose rows were written out as these lines, each with a number in front."""

    def where(self, number: int) -> str:
        """How errors name a row."""
        return place(self.source or self.path, number)


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """Files that `patterns` name, in the order of the patterns, each pattern's sorted; `key` names them in errors."""
    found: list[Path] = []
    problems: list[str] = []
    for pattern in patterns:
        # A name is taken as it is before it is taken as a pattern: file names may hold brackets.
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        try:
            files = [file for match in matches for file in _files_of(Path(match), key, alone=len(matches) == 1)]
        except DataError as error:
            problems += error.problems
            continue
        if not files:
            problems.append(f"{key}: no file {pattern!r}")
        found += files
    if problems:
        raise DataError(problems)
    return found


def _files_of(path: Path, key: str, *, alone: bool) -> list[Path]:
    """The file, or those of a saved data set; other directories that a pattern happens to match are passed over."""
    if not path.is_dir():
        return [path]
    return dataset_files(path, key) if alone or (path / "state.json").is_file() else []


def digest(path: Path, notes: Path, *, write: bool) -> str:
    """SHA-256 of the file's bytes, noted in directory `notes` when `write` is set."""
    identity = file_identity(path)
    note = notes / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    known = read_json(note)
    if isinstance(known, dict) and known.get("identity") == identity:
        return str(known["sha256"])
    value = sha256_of(path)
    if write and time.time() - max(identity[1:]) / 1e9 > _SETTLED_SECONDS:
        write_json(note, {"path": str(path), "identity": identity, "sha256": value})
    return value


def file_identity(path: Path) -> list[int]:
    """Size and times: what changes when the content does."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value.update(block)
    return value.hexdigest()


def cut(path: Path, size: int, source: Optional[Path] = None) -> Iterator[ByteRange]:
    """The file in ranges of about `size` bytes that end at line ends; `source` is what its lines were made from."""
    start, line = 0, 1
    with path.open("rb") as file:
        while block := file.read(size):
            rest = b"" if block.endswith(b"\n") else file.readline()
            end = start + len(block) + len(rest)
            yield ByteRange(path, start, end, line, source)
            line += block.count(b"\n") + rest.count(b"\n")
            start = end


def read_lines(part: ByteRange) -> Iterator[tuple[int, bytes]]:
    """Numbers and lines of a range; blank lines are passed over."""
    with part.path.open("rb") as file:
        file.seek(part.start)
        position, number = part.start, part.first_line
        while position < part.end and (line := file.readline()):
            if part.source is not None:
                noted, _, row = line.partition(b"\t")
                yield int(noted), row
            elif line.strip():
                yield number, line
            position += len(line)
            number += 1
