"""Give each rank its share of every global batch, beginning with any step.

One item of the loader is one optimizer step (a StepBatch), so Lightning's batch index and step count agree. The content
of a step is a function of its number alone (sft.data.batches.sampler): to resume, the loader starts at the
trainer's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology
from sft.data.batches.batch import RankShare, StepBatch, collate
from sft.data.batches.sampler import EMPTY_SLOT, BatchSchedule
from sft.data.cache.store import Examples
from sft.data.prepared.data_key import data_key
from sft.data.prepared.prepare import PreparedData
from sft.data.prepared.schedule import batch_schedule, steps_of, training_schedule
from sft.data.prepared.sources import Sources
from sft.megatron.core import parallel_state
from sft.runtime import lightning as pl

T = TypeVar("T")


class StepBatches(Dataset[StepBatch]):
    """The batches of one data parallel rank, by step."""

    def __init__(self, cache: Examples, schedule: BatchSchedule, spec: RunSpec, topology: Topology, steps: int) -> None:
        self._cache = cache
        self._schedule = schedule
        self._spec = spec
        self._topology = topology
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> StepBatch:
        share = RankShare(
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=self._topology.data_parallel,
            micro_batch_size=self._spec.train.micro_batch_size,
            pad_to_multiple=self._spec.data.pad_to_multiple,
            sequence_multiple=self._topology.sequence_multiple,
            micro_batch_multiple=self._topology.micro_batch_multiple,
            row_length=self._spec.data.seq_length if self._spec.data.packing else None,
            cp_rank=parallel_state.get_context_parallel_rank() if self._topology.context_parallel > 1 else 0,
            cp_size=self._topology.context_parallel,
            noise_seed=None if self._spec.train.neftune_alpha is None else self._spec.train.seed,
        )
        return collate(self._cache, self._schedule, step, share)


class StepLoader(DataLoader[StepBatch]):
    """Loader of StepBatches that starts where the trainer stands.

    `state_dict` and `load_state_dict` tell Lightning that it may resume in the middle of an epoch; the position itself
    is the trainer's step count.
    """

    def __init__(self, batches: StepBatches, trainer: pl.Trainer, *, pin_memory: bool) -> None:
        sampler = _RemainingSteps(trainer, len(batches))
        # Each iterator draws a seed for workers. Drawn from the default generator, it would change the dropout of a CPU
        # run after a resume, which makes one more iterator.
        own = torch.Generator()
        super().__init__(
            batches, batch_size=None, sampler=sampler, collate_fn=_as_it_is, pin_memory=pin_memory, generator=own
        )

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class SFTDataModule(pl.LightningDataModule):
    """Training and held-out batches of a run."""

    def __init__(self, spec: RunSpec, topology: Topology, data: PreparedData) -> None:
        super().__init__()
        self._spec = spec
        self._topology = topology
        self._data = data
        self.schedule = training_schedule(spec, data.train)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return steps_of(self._spec, self.schedule)

    @property
    def data_key(self) -> dict[str, object]:
        """What identifies the sequence of global batches."""
        train = self._data.train
        if not isinstance(train, Sources):
            return data_key(self._spec, {"data.train": train.key})
        pairs = zip(train.shares, train.caches, strict=True)
        return data_key(self._spec, {f"data.sources.{share.name}": cache.key for share, cache in pairs})

    def example_ids(self, step: int) -> list[int | str]:
        """Return the examples of `step` (from 0) as records name them: numbers in data.train, or `source:number`."""
        slots, train = self.schedule.examples_at(step), self._data.train
        examples = [int(example) for example in slots[slots != EMPTY_SLOT]]
        return [train.id_of(example) for example in examples] if isinstance(train, Sources) else list(examples)

    def train_dataloader(self) -> StepLoader:
        batches = StepBatches(self._data.train, self.schedule, self._spec, self._topology, self.max_steps)
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the data module has no trainer yet")
        return StepLoader(batches, trainer, pin_memory=self._spec.resources.gpus_per_node > 0)

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        return batch.to(device)

    def validation_batches(self) -> StepBatches | None:
        """Return batches that hold each held-out example once, shaped as in training, or None without such data."""
        cache = self._data.validation
        if cache is None:
            return None
        schedule = batch_schedule(self._spec, cache, shuffle=False)
        return StepBatches(cache, schedule, self._spec, self._topology, schedule.steps_per_epoch)


class _RemainingSteps(Sampler[int]):
    def __init__(self, trainer: pl.Trainer, steps: int) -> None:
        self._trainer = trainer
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[int]:
        yield from range(self._trainer.global_step, self._steps)


def _as_it_is(batch: T) -> T:
    return batch
