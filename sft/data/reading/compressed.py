"""Read files that were compressed as a whole, by what they hold and not by their names.

Python's own modules read gzip, bzip2 and xz; Zstandard is read with pyarrow.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, cast

from launcher.contract.errors import DataError

Compression = Literal["gzip", "bzip2", "xz", "zstd"]

_MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive"}
_INSTALL = "pip install 'slurm-sft-launcher[data]'"


def compression_of(path: Path) -> Compression | None:
    """Return how a file is compressed, None where it is not. Raise DataError for an archive, which holds many files."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    archive = next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), None)
    if archive is not None:
        raise DataError(f"{path} is {archive}; unpack it and name the data files in it")
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def kind_of(path: Path) -> str:
    """Return the ending that says what a file holds: that of its name, without the ending of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _SUFFIXES else suffix


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading its content, decompressed where it is compressed.

    Raise DataError, also from the body, where it turns out to be damaged.
    """
    compression = compression_of(path)
    try:
        with _open(path, compression) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged {compression} file: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path, compression: Compression | None) -> BinaryIO:
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == "bzip2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if compression == "xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if compression == "zstd":
        return _open_zstd(path)
    return path.open("rb")


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{path}: reading Zstandard needs pyarrow: {_INSTALL}") from None
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
