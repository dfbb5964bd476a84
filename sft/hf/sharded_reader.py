"""Read single tensors, or single layers of stacked ones, out of a sharded checkpoint: one process, no Megatron-core.

Megatron-core writes torch's distributed checkpoint format, so torch's own reader takes the files apart; only the
plan (which chunks make up one layer) is made here.

The index of such a checkpoint is a pickle. It is read by an unpickler that knows the dozen classes an index is made
of and refuses every other name, so that a checkpoint from elsewhere cannot run code; tensors are loaded with
weights_only.

Rejected: `torch.distributed.checkpoint.load`, which fills whole stacked tensors (all layers at once), and building
the model to load into it, which needs process groups and the memory of the whole model.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import IO

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from launcher.contract.errors import CheckpointError

INDEX = ".metadata"

_CHECKPOINT = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_INDEX_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class ShardedReader:
    """The tensors of the sharded checkpoint in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._metadata = read_index(directory)
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def keys(self) -> set[str]:
        """Return the keys of all tensors."""
        return {key for key, entry in self._metadata.state_dict_metadata.items() if _is_tensor(entry)}

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor, layers included."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the number type of a tensor."""
        return self._entry(key).properties.dtype

    def tensor(self, key: str, index: int | None = None) -> torch.Tensor:
        """Return a whole tensor, or one entry of its leading axis, from all file chunks that hold a part of it."""
        entry = self._entry(key)
        first, size = [0] * len(entry.size), list(entry.size)
        if index is not None:
            first[0], size[0] = index, 1
        wanted = ChunkStorageMetadata(torch.Size(first), torch.Size(size))
        target = torch.empty(size, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(size):
            raise CheckpointError(f"checkpoint {self._directory}: {key} is not complete")
        try:
            self._reader.read_data(LoadPlan(items), _OneTensor(target)).wait()
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"checkpoint {self._directory}: {key} cannot be read ({error})") from error
        return target if index is None else target[0]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"checkpoint {self._directory}: no tensor {key}")
        return entry


class _OneTensor(DefaultLoadPlanner):
    """Puts every chunk that is read into its place in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: `resolve_tensor` gave a view."""


class _IndexUnpickler(pickle.Unpickler):
    """Knows what an index is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if module == _MEGATRON:
            return Metadata  # a subclass of theirs, in some versions; its fields are the same
        if (module, name) in _INDEX_CLASSES or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into an index")


def read_index(directory: Path) -> Metadata:
    """Return the index of a sharded checkpoint. CheckpointError where it is not one, or names what would run code."""
    path = directory / INDEX
    try:
        with path.open("rb") as file:
            metadata = _unpickle(file)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {directory}: no {INDEX}; it is not a sharded checkpoint") from None
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(f"checkpoint {directory}: {INDEX} cannot be read ({error})") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"checkpoint {directory}: {INDEX} is not an index")
    return metadata


def _unpickle(file: IO[bytes]) -> object:
    return _IndexUnpickler(file).load()


def _is_tensor(entry: object) -> bool:
    return isinstance(entry, TensorStorageMetadata)
