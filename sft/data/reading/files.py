"""Data files as bytes: find them, compute their digests, and cut them into ranges for workers.

A digest identifies the content, so a file can be moved or copied without being tokenized again. Every rank needs the
digest to find the cache, but reading a large data set on every rank would take longer than tokenizing it. So the
process that builds the cache stores digests beside it; they hold while size and times of the file stay the same.

Workers get byte ranges that end at line ends, with the number of their first line: memory stays flat whatever the size
of a file, and errors still name file and line.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import DataError
from launcher.contract.rundir import JsonObject, read_json, write_json
from sft.data.reading.compressed import kind_of
from sft.data.reading.tables import DATA_FILES, dataset_files, place

_BLOCK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SETTLED_SECONDS = 2.0
"""The digest of a file changed less than this long ago is not stored: file systems with coarse clocks could give a
later change the same time."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range of bytes of a file that holds whole lines."""

    path: Path
    start: int
    end: int
    first_line: int
    source: Path | None = None
    """The data file whose rows were written out as these lines, each after its number and a tab."""

    def where(self, number: int) -> str:
        """Return how errors name the row with this number."""
        return place(self.source or self.path, number)


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """Return the files that `patterns` match, pattern after pattern, those of one pattern sorted.

    Raise DataError, beginning with `key`, for each pattern that matches nothing.
    """
    matched: list[Path] = []
    problems: list[str] = []
    for pattern in patterns:
        # An existing file comes before a pattern: file names may contain brackets.
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        try:
            files = [file for match in matches for file in _files_of(Path(match), key, alone=len(matches) == 1)]
        except DataError as error:
            problems += error.problems
            continue
        if not files:
            problems.append(f"{key}: no file {pattern!r}")
        matched += files
    if problems:
        raise DataError(problems)
    return matched


def _files_of(path: Path, key: str, *, alone: bool) -> list[Path]:
    """Return the file itself, the files of a directory that `datasets` saved, or the data files in any other one."""
    if not path.is_dir():
        return [path]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return dataset_files(path, key)
    # Among several matches of a pattern, other directories are skipped; one named alone is meant.
    return _data_files_in(path, key) if alone else []


def _data_files_in(directory: Path, key: str) -> list[Path]:
    """Return the data files in a directory, sorted, or raise DataError where there are none or of several kinds."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith(".")]
    found = [path for path in files if kind_of(path) in DATA_FILES]
    kinds = sorted({kind_of(path) for path in found})
    if not found:
        raise DataError(
            f"{key}: {str(directory)!r} is no data set that `datasets` saved, and holds no data file "
            f"({', '.join(DATA_FILES)}); for files in folders below it name {directory!s}/**/*.jsonl, say"
        )
    if len(kinds) > 1:  # which may be the same rows twice, or a description of the others
        choice = ", ".join(f"{directory}/*{ending}" for ending in kinds)
        raise DataError(f"{key}: {str(directory)!r} holds files of several kinds; name one of {choice}")
    return found


def digest(path: Path, notes: Path, *, write: bool) -> str:
    """Return the SHA-256 of the file's bytes, from directory `notes` if it is known there.

    With `write` a digest that had to be computed is stored there.
    """
    return remembered_digest(path, file_identity(path), notes, sha256_of, write=write)


def remembered_digest(
    path: Path, identity: Sequence[int], notes: Path, compute: Callable[[Path], str], *, write: bool
) -> str:
    """Return what `compute` makes of a file or folder, or made of it when its `identity` was the same.

    The identity holds sizes, and times in nanoseconds. With `write` a digest that had to be computed is stored.
    """
    known = _noted_digest(path, identity, notes)
    if known is not None:
        return known
    value = compute(path)
    if write and time.time() - max(identity) / 1e9 > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # a shared cache may be read-only: the digest is computed again then
            write_json(_note(path, notes), {"path": str(path), "identity": list(identity), "sha256": value})
    return value


def known_digest(path: Path, notes: Path) -> str | None:
    """Return the SHA-256 of the file's bytes where directory `notes` has it, without reading the file."""
    return _noted_digest(path, file_identity(path), notes)


def _noted_digest(path: Path, identity: Sequence[int], notes: Path) -> str | None:
    known = _noted(_note(path, notes))
    is_known = known.get("identity") == list(identity) and _SHA256.fullmatch(str(known.get("sha256")))
    return str(known["sha256"]) if is_known else None


def _note(path: Path, notes: Path) -> Path:
    return notes / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"


def _noted(note: Path) -> JsonObject:
    """Return what a note holds, nothing where there is none that can be read."""
    try:
        known = read_json(note)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def file_identity(path: Path) -> list[int]:
    """Return size and times of the file: what changes when its content does."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the file's bytes."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value.update(block)
    return value.hexdigest()


def cut(path: Path, size: int, source: Path | None = None) -> Iterator[ByteRange]:
    """Yield the file in ranges of about `size` bytes that end at line ends.

    `source` is the data file from which the lines were written, if they were (`ByteRange.source`).
    """
    start, line = 0, 1
    with path.open("rb") as file:
        while block := file.read(size):
            rest = b"" if block.endswith(b"\n") else file.readline()
            end = start + len(block) + len(rest)
            yield ByteRange(path, start, end, line, source)
            line += block.count(b"\n") + rest.count(b"\n")
            start = end


def read_lines(part: ByteRange) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a range with their numbers, without blank lines."""
    with part.path.open("rb") as file:
        file.seek(part.start)
        position, number = part.start, part.first_line
        while position < part.end and (line := file.readline()):
            if part.source is not None:
                row_number, _, row = line.partition(b"\t")
                yield int(row_number), row
            elif line.strip():
                yield number, line
            position += len(line)
            number += 1
