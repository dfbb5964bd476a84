"""Checksums of files, by which a reader finds bytes that changed after they were written.

CRC-32, because zlib computes it at gigabytes a second: it is there against damage, not against an attacker.
"""

from __future__ import annotations

import zlib
from pathlib import Path

_BLOCK = 1 << 22


def crc32(path: Path) -> str:
    """Return the CRC-32 of a file in hexadecimal."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
