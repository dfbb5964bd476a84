"""Refuse a checkpoint whose pickles would run code: `checkpoint.resume_from` may name one that somebody else has made.

A sharded checkpoint has three kinds of pickles. Megatron-core and torch load two of them without limits: the index, and
what is no tensor (states of random generators, counters of the optimizer). All of ours are made of tensors and plain
containers. Whatever else is in one is refused before anything is loaded. Tensors are loaded with weights_only anyway.

Checksums do not help here: whoever writes a checkpoint writes its checksums as well.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from launcher.contract.errors import CheckpointError
from sft.hf.sharded_reader import read_index


def refuse_code(directory: Path) -> None:
    """Raise CheckpointError where a pickle of a sharded checkpoint holds more than tensors and plain containers."""
    for name, data in _pickles(directory):
        try:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"checkpoint {directory}: {name} holds more than tensors and plain values; loading it could run code "
                f"({first}); train from weights instead (model.path), or from a checkpoint of your own"
            ) from None


def _pickles(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of all but the index and the tensors. CheckpointError for an index that does not do."""
    index = read_index(directory)
    for place, stored in index.storage_data.items():
        if Path(stored.relative_path).name != stored.relative_path:
            raise CheckpointError(f"checkpoint {directory}: its index names a file elsewhere, {stored.relative_path}")
        if isinstance(index.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
            with (directory / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                yield place.fqn, file.read(stored.length)
    for path in sorted(directory.glob("*.pt")):
        yield path.name, path.read_bytes()
