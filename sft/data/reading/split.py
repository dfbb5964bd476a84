"""Hold rows of the training files back for evaluation (data.validation_split).

Which rows are held out follows from a hash of each row, so neither the order of the files nor a seed matters, and rows
that are equal are on one side. Whole rows are taken, before they are tokenized: pieces of one row would be on both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from launcher.contract.errors import DataError
from sft.data.reading.files import ByteRange, read_lines
from sft.data.reading.row import BINARY
from sft.data.reading.tables import as_json, holds_lines, read_rows

Side = Literal["train", "held_out"]

_BINARY = re.compile(rb'\{"%s": [0-9]+\}' % BINARY.encode())
"""Binary data in a line. They were null there, and a row must not change its side."""


@dataclass(frozen=True, slots=True)
class Split:
    """One side of the split of some files."""

    side: Side
    limit: int
    """Rows whose hash is not above it are held out."""

    def takes(self, line: bytes) -> bool:
        """Return whether the row in this line is on this side."""
        return (_hash(line) <= self.limit) == (self.side == "held_out")


def split_of(files: Sequence[Path], amount: str, side: Side, key: str) -> Split:
    """Return one side of the split that holds out `amount`, a percentage (`1%`) or a number of rows.

    Reads all files. Raise DataError, beginning with `key`, where that leaves nothing to train on or to evaluate.
    """
    hashes = np.fromiter(map(_hash, _lines(files)), dtype=np.uint64)
    wanted = round(float(amount[:-1]) / 100 * len(hashes)) if amount.endswith("%") else int(amount)
    if not 0 < wanted < len(hashes):
        raise DataError(
            f"{key}: {amount} of {len(hashes):,} rows is {wanted:,}, and at least one row must be on each side"
        )
    limit = int(np.partition(hashes, wanted - 1)[wanted - 1])
    if limit == int(hashes.max()):
        raise DataError(f"{key}: {amount} of {len(hashes):,} rows leaves none to train on, because rows are equal")
    return Split(side, limit)


def _lines(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        if holds_lines(path):
            yield from (line for _, line in read_lines(ByteRange(path, 0, path.stat().st_size, 1)))
        else:
            yield from (as_json(row).encode() for _, row in read_rows(path))


def _hash(line: bytes) -> int:
    line = _BINARY.sub(b"null", line.strip())
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
