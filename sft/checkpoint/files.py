"""The files of a checkpoint directory: checksums, the marker that says it is complete, removal.

COMPLETE holds the size and CRC-32 of every file. Comparing sizes is free and finds truncated files; the checksum finds
changed bytes. CRC-32 runs at gigabytes a second, SHA-256 takes five times as long, and the danger is a failing disk,
not a forger.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

import torch

from launcher.contract.checksum import crc32
from launcher.contract.rundir import COMPLETE, read_json, sync_path
from sft.checkpoint.contents import TRAINER


class _Sealed(TypedDict):
    """What COMPLETE holds of one file."""

    bytes: int
    crc32: str


_SPACE_MARGIN = 1.02
"""File headers and metadata beside the tensors."""


def seal(directory: Path, known: Mapping[str, str]) -> None:
    """Sync every file and write COMPLETE. `known` are checksums that the writers have computed, by file name."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            sync_path(path)
            checksum = known.get(path.name) or crc32(path)
            files[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "crc32": checksum}
    for folder in {(directory / name).parent for name in files}:
        sync_path(folder)
    write_synced(directory / COMPLETE, json.dumps({"files": files}, indent=1))
    sync_path(directory)


def damage(source: Path) -> str | None:
    """Return what is wrong with a checkpoint directory, or None if every file is there in the size it was written.

    Of trainer.json, which is small and read before the tensors, the checksum is compared as well.
    """
    files = _sealed_files(source)
    if isinstance(files, str):
        return files
    for name, written in files.items():
        try:
            found = (source / name).stat().st_size
        except (OSError, ValueError) as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read: {error}"
        if found != written["bytes"]:
            return f"{name} has {found} bytes, written were {written['bytes']}"
    return _changed(source, TRAINER, files[TRAINER]["crc32"]) if TRAINER in files else None


def _sealed_files(source: Path) -> dict[str, _Sealed] | str:
    """Return the files that COMPLETE names, or what is wrong with it."""
    try:
        marker = read_json(source / COMPLETE)
    except (OSError, ValueError):
        return f"{COMPLETE} is not readable"
    if marker is None:
        return f"no {COMPLETE}: it was not finished"
    files = marker.get("files") if isinstance(marker, dict) else None
    if not isinstance(files, dict) or not files:
        return f"{COMPLETE} does not name the files of a checkpoint"
    for written in files.values():
        if not isinstance(written, dict):
            return f"its {COMPLETE} is from another version, without checksums"
        if type(written.get("bytes")) is not int or not isinstance(written.get("crc32"), str):
            return f"{COMPLETE} has no size and checksum for each file"
    return files


def changed_bytes(source: Path, *, share: int = 0, shares: int = 1) -> str | None:
    """Return the first file whose bytes are not those that were written, or None.

    Reads every `shares`-th file, beginning with number `share`, so that ranks can divide the work.
    """
    files = _sealed_files(source)
    if isinstance(files, str):
        return files
    for name in sorted(files)[share::shares]:
        problem = _changed(source, name, files[name]["crc32"])
        if problem is not None:
            return problem
    return None


def _changed(source: Path, name: str, expected: str) -> str | None:
    try:
        found = crc32(source / name)
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}"
    return None if found == expected else f"{name} has changed: its CRC-32 is {found}, written was {expected}"


def remove(directory: Path) -> None:
    """Remove a checkpoint so that no reader ever sees a part of it as a complete one."""
    aside = directory.parent / f".{directory.name}.removed"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        directory.rename(aside)
    except OSError:  # already removed, or the disk refuses: the next save tries again
        return
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what processes that were killed while they wrote or removed a checkpoint left in this directory."""
    for kind in ("removed", "partial"):
        for path in checkpoints.glob(f".step-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def remove_all_but(checkpoints: list[Path], keep: Iterable[Path]) -> None:
    """Remove the checkpoints that are not in `keep`, but never the newest, the last of the list."""
    kept = {*keep, *checkpoints[-1:]}
    for path in checkpoints:
        if path not in kept:
            remove(path)


def check_space(directory: Path, needed: int) -> None:
    """Raise OSError where the file system has no room for `needed` bytes."""
    free = shutil.disk_usage(directory).free
    if needed * _SPACE_MARGIN > free:
        raise OSError(
            f"it needs about {needed * _SPACE_MARGIN / 2**20:,.0f} MiB, "
            f"and {free / 2**20:,.0f} MiB are free in {directory.parent}"
        )


def local_bytes(state: object) -> int:
    """Return the bytes of tensors that this rank writes of a sharded state, in which one rank writes each replica."""
    if isinstance(state, dict):
        return sum(local_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(local_bytes(value) for value in state)
    replica = getattr(state, "replica_id", 0)
    if any(replica) if isinstance(replica, tuple) else replica:
        return 0
    data = getattr(state, "data", None)
    return data.numel() * data.element_size() if isinstance(data, torch.Tensor) else 0


def write_synced(path: Path, text: str) -> None:
    """Write a file and sync it, so that it survives a crash of the machine."""
    path.write_text(text, encoding="utf-8")
    sync_path(path)
