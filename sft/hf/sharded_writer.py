"""Write a sharded checkpoint from parameters that come one by one: one process, no Megatron-core, no process group.

The counterpart of `sft.hf.sharded_reader`: torch's own writer makes files and index, only the plan is made here.
Tensors are asked for when they are written, so that memory never holds more than one of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileChunk:
    """A tensor to write: all of a key, or one entry of its leading axis."""

    key: str
    name: str
    """What the tensor is asked for by."""
    shape: tuple[int, ...]
    """Of the whole key, leading axis included."""
    dtype: torch.dtype
    index: int | None = None
    """Its place on the leading axis."""

    @property
    def place(self) -> ChunkStorageMetadata:
        """Its offsets and sizes within the key."""
        offsets = [0] * len(self.shape)
        sizes = list(self.shape)
        if self.index is not None:
            offsets[0], sizes[0] = self.index, 1
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    @property
    def item(self) -> WriteItem:
        """Its entry in torch's plan."""
        data = TensorWriteData(self.place, TensorProperties(dtype=self.dtype), torch.Size(self.shape))
        return WriteItem(MetadataIndex(self.key, self.place.offsets), WriteItemType.SHARD, tensor_data=data)


def write_sharded(
    directory: Path,
    file_chunks: Sequence[FileChunk],
    tensor_of: Callable[[str], torch.Tensor],
    objects: Mapping[str, object],
    common: Mapping[str, object],
) -> None:
    """Write `directory` in Megatron-core's torch_dist format.

    `tensor_of` gives the tensor of a chunk's name. `objects` are small things other than tensors, by key; `common` is
    what every rank gets as it is.
    """
    directory.mkdir(parents=True)
    planner = _OneByOne(file_chunks, tensor_of, objects)
    writer = _Writer(directory)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(planner.items()))])[0]
    results = writer.write_data(plan, planner).wait()
    writer.finish(Metadata(planner.index()), [results])
    torch.save(dict(common), directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_FORMAT | {"common_backend_version": 1}), encoding="utf-8")


class _Writer(FileSystemWriter):
    """Leaves out of the index on whose machine and in which folder it was written."""

    def storage_meta(self) -> None:
        return None


class _OneByOne(DefaultSavePlanner):
    """Hands the writer each tensor when its turn has come."""

    def __init__(
        self, file_chunks: Sequence[FileChunk], tensor_of: Callable[[str], torch.Tensor], objects: Mapping[str, object]
    ) -> None:
        super().__init__()
        self._file_chunks = {file_chunk.item.index: file_chunk for file_chunk in file_chunks}
        self._tensor_of = tensor_of
        self._objects = objects

    def items(self) -> list[WriteItem]:
        """Return what is to be written."""
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        return [*objects, *(file_chunk.item for file_chunk in self._file_chunks.values())]

    def index(self) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
        """Return every key and the chunks it is made of."""
        tensors: dict[str, TensorStorageMetadata] = {}
        for file_chunk in self._file_chunks.values():
            entry = TensorStorageMetadata(TensorProperties(dtype=file_chunk.dtype), torch.Size(file_chunk.shape), [])
            tensors.setdefault(file_chunk.key, entry).chunks.append(file_chunk.place)
        return {**dict.fromkeys(self._objects, BytesStorageMetadata()), **tensors}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the tensor in the shape of its chunk, or the bytes that Megatron-core would write of an object."""
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], buffer)
            return buffer
        file_chunk = self._file_chunks[write_item.index]
        return self._tensor_of(file_chunk.name).to(file_chunk.dtype).reshape(file_chunk.place.sizes).contiguous()
