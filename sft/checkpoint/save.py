"""Write a checkpoint: all ranks plan it, a thread of each rank writes, and all ranks together make it visible.

A save has three parts. `begin` plans it and copies this rank's tensors to host memory. A thread then writes the copy
and computes checksums. `finish` waits for the threads of all ranks, writes the files that are rank 0's, and renames the
hidden directory in which all of this was written. A synchronous save calls one after the other; an asynchronous one
trains on between `begin` and `finish`. Only one save is in flight, so that only one copy is in memory.

A full disk is noticed before the first byte where the file system reports it. Otherwise it leaves only the hidden
directory, which the next save removes.

Rejected: Megatron-core's asynchronous caller. It forks the rank, with its CUDA context, gloo threads and locks, and
relies on copy-on-write, so that memory grows with what training changes; results come back through a manager process
that outlives the rank. Before 0.17 its synchronous path forks writers too, and waits forever when one dies. The format
of the files, and the function that writes one, are Megatron-core's here, too.
"""

from __future__ import annotations

import inspect
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from launcher.contract.checksum import crc32
from launcher.contract.errors import CheckpointError
from launcher.contract.rundir import sync_path
from sft.checkpoint import files as checkpoint_files
from sft.checkpoint.contents import SHARDED, TRAINER, TrainerState
from sft.megatron.core import AsyncRequest, CheckpointingException, dist_checkpointing, filesystem_async
from sft.megatron.parallel.groups import ControlGroup
from sft.megatron.patches.write_errors import raise_write_error

# From 0.17 on Megatron-core's default is a writer from another package, nvidia-resiliency-ext.
_STRATEGY = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)
_FAILURES = (OSError, RuntimeError, CheckpointException, CheckpointingException)


@dataclass(slots=True)
class _Save:
    """A save in flight; the rank and its writing thread share it."""

    target: Path
    aside: Path
    trainer: TrainerState
    began: float
    request: AsyncRequest | None = None
    thread: threading.Thread | None = None
    error: str | None = None
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished save."""

    path: Path
    seconds: float
    """Time from `begin` to the end of `finish`."""


class CheckpointSaver:
    """Saves checkpoints. Methods are collective: every rank calls them in the same order. Properties are not."""

    def __init__(self, control: ControlGroup, attempt: str) -> None:
        self._control = control
        self._suffix = f"{attempt}.partial"  # two attempts must not write into one directory, even where one is dead
        self.may_write: Callable[[], None] = lambda: None
        """On the first rank: raises where another attempt has the run, and nothing may be changed any more."""
        self._leader = torch.distributed.get_rank() == 0
        self._save: _Save | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save has begun and not finished."""
        return self._save is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of the save in flight, or has failed to."""
        return self._save is not None and (self._save.thread is None or not self._save.thread.is_alive())

    def begin(self, target: Path, state: dict[str, object], trainer: TrainerState, *, copy: bool) -> None:
        """Begin to write `state` to `target`. With `copy`, copy tensors that are in host memory first.

        A checkpoint that exists at `target` is replaced: it must be a damaged one, since the run repeats its step.
        CheckpointError is raised on all ranks, and leaves nothing behind.
        """
        if self._save is not None:
            raise RuntimeError("a save is still in flight")
        save = _Save(target, target.parent / f".{target.name}.{self._suffix}", trainer, time.perf_counter())
        needed = self._control.total(checkpoint_files.local_bytes(state))
        self._attempt(save, lambda: self._make_room(save, needed))
        self._attempt(save, lambda: self._plan(save, state, copy))
        self._save = save
        save.thread = threading.Thread(target=_write, args=(save,), name=f"save {target.name}")
        save.thread.start()

    def finish(self) -> Saved | None:
        """Wait for all ranks and make the checkpoint visible. Return None where no save is in flight."""
        save = self._save
        if save is None:
            return None
        if save.thread is not None:
            save.thread.join()
        self._save = None
        self._raise_first(save, save.error)
        gathered = self._control.gather(save.checksums)
        self._attempt(save, lambda: self._publish(save, gathered))
        return Saved(save.target, time.perf_counter() - save.began)

    def _attempt(self, save: _Save, part: Callable[[], None]) -> None:
        """Call `part` on every rank, and raise on all ranks if it fails on one."""
        error = None
        try:
            part()
        except _FAILURES as problem:
            error = _describe(problem)
        self._raise_first(save, error)

    def _make_room(self, save: _Save, needed: int) -> None:
        if self._leader:
            self.may_write()
            checkpoint_files.remove_leftovers(save.aside.parent)
            shutil.rmtree(save.aside, ignore_errors=True)  # whatever it is named
            (save.aside / SHARDED).mkdir(parents=True)
            checkpoint_files.check_space(save.aside, needed)

    def _plan(self, save: _Save, state: dict[str, object], copy: bool) -> None:
        request = dist_checkpointing.save(state, str(save.aside / SHARDED), async_sharded_save=True, **_STRATEGY)
        raise_write_error()
        if request.preload_fn is not None:
            rank, buckets, results = request.async_fn_args
            staged = request.preload_fn()  # copies from the device
            if copy:
                staged = [_copied(after, before) for after, before in zip(staged, buckets, strict=True)]
            request = request._replace(async_fn_args=(rank, staged, results))
        save.request = request

    def _publish(self, save: _Save, gathered: list[dict[str, str]]) -> None:
        if save.request is not None:
            for finalize in save.request.finalize_fns:
                finalize()
            raise_write_error()
        if not self._leader:
            return
        checkpoint_files.write_synced(save.aside / TRAINER, save.trainer.to_json())
        checkpoint_files.seal(save.aside, {name: value for part in gathered for name, value in part.items()})
        self.may_write()
        checkpoint_files.remove(save.target)
        save.aside.rename(save.target)
        sync_path(save.target.parent)

    def _raise_first(self, save: _Save, error: str | None) -> None:
        """Raise the first error of any rank on all of them, after removing the partial directory."""
        first = self._control.first_error(error)
        if first is None:
            return
        if self._leader:
            shutil.rmtree(save.aside, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {save.target.name} was not written: {first}; earlier complete checkpoints are untouched. "
            "Free space or set checkpoint.keep_last lower, then resubmit"
        )


def _copied(after: Any, before: Any) -> Any:
    """Return a staged bucket that shares no memory with the model. Staging itself copies only from the device."""
    path, key, (raw, tensors) = after
    _, _, (_, originals) = before
    own = [
        (item, tensor.clone() if original.device.type == "cpu" else tensor)
        for (item, tensor), (_, original) in zip(tensors, originals, strict=True)
    ]
    return path, key, (raw, own)


def _write(save: _Save) -> None:
    """Write this rank's files, on the thread, as Megatron-core's writers would, and hand it the results."""
    request = save.request
    if request is None or request.async_fn is None:
        return
    _, buckets, results = request.async_fn_args
    transforms = request.async_fn.args[0]
    written: dict[int, Any] = {}
    try:
        for index, bucket in enumerate(buckets):
            outcome: queue.Queue[Any] = queue.Queue()
            started: queue.Queue[int] = queue.Queue()
            started.put(index)  # the function below takes one item when it is done
            write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
            write(transforms, index, bucket, outcome, started, True)
            _, written[index] = outcome.get_nowait()
            if isinstance(written[index], Exception):  # which is how that function reports one
                raise written[index]
            save.checksums[Path(bucket[0]).name] = crc32(Path(bucket[0]))
        results.put(written)
    except Exception as problem:  # nothing above a thread catches: the rank raises it in `finish`
        save.error = _describe(problem)
    finally:
        save.request = request._replace(async_fn_args=())  # free the copy in host memory now


def _describe(problem: BaseException) -> str:
    text = str(problem).strip().splitlines()
    return text[-1] if text else type(problem).__name__
