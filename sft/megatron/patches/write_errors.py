"""Errors of the files that rank 0 writes alone, raised when all ranks can learn of them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import reduce

from sft.megatron.patches.patch import Patch

_errors: list[OSError | RuntimeError] = []

_CHECKPOINTING = "megatron.core.dist_checkpointing"
_WHY = (
    "rank 0 writes {file} alone, between two collectives of a save. Where the disk is full it leaves by an error, and "
    "the other ranks wait in the second collective for ever"
)
_TEST = "parity/test_checkpoint.py::test_disk_full_for_what_rank_0_writes_alone"


def raise_write_error() -> None:
    """Raise the first error of a file that rank 0 wrote alone since this was last called."""
    errors = _errors.copy()
    _errors.clear()
    if errors:
        raise errors[0]


def _raising_later(write: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(write)
    def attempt(*args: object, **kwargs: object) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save gives the second for a full disk
            _errors.append(error)

    return attempt


def _patch(file: str, target: str, **versions: str) -> Patch:
    def apply() -> None:
        module, _, path = target.partition(":")
        *holders, name = path.split(".")
        holder = reduce(getattr, holders, importlib.import_module(module))
        setattr(holder, name, _raising_later(getattr(holder, name)))

    why = _WHY.format(file=file)
    return Patch(name=f"write_errors {file}", why=why, targets=(target,), test=_TEST, apply=apply, **versions)


PATCHES = (
    _patch("common.pt", f"{_CHECKPOINTING}.strategies.common:TorchCommonSaveStrategy.save_common", before="0.17"),
    # From 0.19 on its content is in the sharded files, which every rank writes.
    _patch("common.pt", f"{_CHECKPOINTING}.serialization:save_common", since="0.17", before="0.19"),
    _patch(".metadata", f"{_CHECKPOINTING}.strategies.filesystem_async:FileSystemWriterAsync.finish"),
    _patch("metadata.json", f"{_CHECKPOINTING}.serialization:save_config"),
)
