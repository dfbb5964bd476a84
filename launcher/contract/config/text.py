"""The text of a config file."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TextIO

from launcher.contract.arrival import here_path
from launcher.contract.errors import ConfigError, did_you_mean

_LARGEST_FILE = 10_000_000
"""Bytes."""


def read_text(path: Path) -> str:
    """Return the text of a config file, `-` being standard input, or raise ConfigError where it cannot be read."""
    if str(path) == "-":
        return _standard_input(sys.stdin)
    try:
        file = here_path(path)
        if file.exists() and not file.is_file():  # to open a named pipe would wait for its writer
            raise ConfigError(f"{path} is not a file")
        if file.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path} has {file.stat().st_size:,} bytes, and a config at most {_LARGEST_FILE:,}")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [item.name for item in path.parent.glob("*.y*ml")])
        raise ConfigError(f"{path}: no such file{near}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=1)
def _standard_input(stream: TextIO) -> str:
    """Return the text on standard input, which is read once however often it is asked for."""
    try:
        return stream.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"-: not a text in UTF-8 (byte {error.start})") from None
