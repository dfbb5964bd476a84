"""Send a file of one rank's node to that of another rank, byte by byte, over the control group.

Bytes of the file are sent, not tensors: what arrives can be held to the checksum of what was written. (A package that
rebuilds tensors on the other side has written NaN into copies of fp8 weights, without an error.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from sft.checkpoint.copy_parts import open_new
from sft.megatron.parallel.groups import ControlGroup

_FILE_CHUNK = 64 << 20
"""Bytes of a message: enough for a network's full speed, little beside a model."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A file on its way, seen from one of its two ends."""

    path: Path
    bytes: int
    peer: int
    """The rank at the other end."""


def exchange(control: ControlGroup, outgoing: Transfer | None, incoming: Transfer | None) -> str | None:
    """Send one file and receive another at the same time. Return what went wrong with this rank's files, or None.

    A rank whose disk fails sends and receives on, so that the other end is not kept waiting: the checksum tells it.
    """
    problem: str | None = None
    with contextlib.ExitStack() as files:
        source = target = None
        try:
            if outgoing is not None:
                source = files.enter_context(FileIO(outgoing.path))
            if incoming is not None:
                target = files.enter_context(FileIO(open_new(incoming.path), "w"))
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
        for to_send, to_receive in _sizes(outgoing, incoming):
            sent, received = torch.zeros(to_send, dtype=torch.uint8), torch.empty(to_receive, dtype=torch.uint8)
            if source is not None:
                source.readinto(sent.numpy().data)
            control.exchange(sent, outgoing.peer if outgoing else 0, received, incoming.peer if incoming else 0)
            if target is not None and incoming is not None and problem is None:
                problem = _write(target, received, incoming.path)
    return problem


def _sizes(outgoing: Transfer | None, incoming: Transfer | None) -> Iterator[tuple[int, int]]:
    """Yield how many bytes to send and to receive in each message. 0 is no message."""
    left_out, left_in = (0 if transfer is None else transfer.bytes for transfer in (outgoing, incoming))
    while left_out or left_in:
        to_send, to_receive = min(left_out, _FILE_CHUNK), min(left_in, _FILE_CHUNK)
        yield to_send, to_receive
        left_out, left_in = left_out - to_send, left_in - to_receive


def _write(target: FileIO, received: Tensor, path: Path) -> str | None:
    """Write what has come. A write that is cut short leaves a file of the wrong size, which its reader finds."""
    try:
        target.write(received.numpy().data)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
