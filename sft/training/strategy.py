"""MegatronStrategy: Lightning starts and loops, Megatron-core owns groups, gradients, optimizer state and checkpoints.

Built on DDPStrategy for its process group and device handling only; torch's DistributedDataParallel is never used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from launcher.contract.topology import Topology
from sft.checkpoint.contents import TrainerState, optimizer_form
from sft.checkpoint.load import load_newest, sharded_state
from sft.checkpoint.memory_copies import MemoryCopies
from sft.checkpoint.save import CheckpointSaver
from sft.hf.checks import trained_adapters
from sft.hf.learning_rates import rate_groups
from sft.megatron.core import __version__ as megatron_version
from sft.megatron.core import parallel_state
from sft.megatron.parallel.groups import ControlGroup, init_model_parallel
from sft.models.numerics import numerics
from sft.runtime import lightning as pl
from sft.runtime.lightning import DDPStrategy
from sft.runtime.rank_env import RankEnv
from sft.runtime.start_clock import StartClock

if TYPE_CHECKING:
    from sft.engine.module import SFTGPT


class MegatronStrategy(DDPStrategy):
    """Runs an SFTGPT under a Topology."""

    strategy_name = "megatron"

    def __init__(
        self, topology: Topology, seed: int, data_key: Mapping[str, object], clock: StartClock | None = None
    ) -> None:
        super().__init__()
        self._clock = clock or StartClock()
        self.topology = topology
        self.seed = seed
        self.data_key = data_key
        """Identifies the data and their order; checkpoints of other data are refused."""
        self.control: ControlGroup
        self.saver: CheckpointSaver
        self.resumed_from: Path | str | None = None
        self.copies: MemoryCopies | None = None
        """Copies of the run's state in memory, where it has some."""
        self._is_set_up = False

    @property
    def megatron_module(self) -> SFTGPT:
        return cast("SFTGPT", self.lightning_module)

    def setup_environment(self) -> None:
        """Start the process groups, unless they are there: Lightning does so in `fit`, others may before it."""
        if self._is_set_up:
            return
        self._is_set_up = True
        super().setup_environment()
        init_model_parallel(self.topology, self.seed)
        self.control = ControlGroup()
        self.saver = CheckpointSaver(self.control, RankEnv.from_environ().attempt)
        self._clock.end("process groups")

    def setup(self, trainer: pl.Trainer) -> None:
        self._clock.end("weights")
        super().setup(trainer)
        self._clock.end("optimizer")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, object]:
        return {
            "num_replicas": parallel_state.get_data_parallel_world_size(),
            "rank": parallel_state.get_data_parallel_rank(),
        }

    def configure_ddp(self) -> None:
        self.megatron_module.wrap_chunks()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # the sharded load fills a built model and optimizer

    def lightning_module_state_dict(self) -> dict[str, object]:
        return {}  # tensors travel in the sharded checkpoint

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        pass

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        pass

    def save_checkpoint(
        self, checkpoint: dict[str, object], filepath: str | Path, storage_options: object = None
    ) -> None:
        """Begin to write `checkpoint` (Lightning's counters) and all sharded state. `saver.finish` completes it.

        Where `storage_options` are copies in memory, it becomes one of those instead.
        """
        module = self.megatron_module
        if isinstance(storage_options, MemoryCopies):
            storage_options.make(module.trainer.global_step, module, checkpoint)
            return
        module.gather_weights()
        trainer = TrainerState(
            lightning=checkpoint,
            topology=dataclasses.asdict(module.topology),
            data_key=self.data_key,
            versions={"torch": torch.__version__, "megatron_core": megatron_version},
            rate_groups=rate_groups(module.spec.train.optimizer),
            adapters=trained_adapters(module.spec.model.lora, module.architecture),
            model=numerics(module.architecture),
            optimizer=optimizer_form(module.spec.train),
            base_weights=str(module.model_chunks[0].module.base_weights) or None,
        )
        state = sharded_state(module, loading=False)
        self.saver.begin(Path(filepath), state, trainer, copy=module.spec.checkpoint.asynchronous)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, object]:
        """Fill model and optimizer, and return Lightning's counters: from a copy in memory where one was chosen.

        Where the checkpoint is damaged, an older one beside it is loaded.
        """
        if self.copies is not None and self.copies.chosen is not None:
            step, counters = self.copies.load(self.megatron_module)
            self.resumed_from = f"the copy of step {step} in memory"
        else:
            self.resumed_from, counters = self.load_weights(Path(checkpoint_path))
        self._clock.end("checkpoint")
        return counters

    def load_weights(self, source: Path) -> tuple[Path, dict[str, object]]:
        """Fill model and optimizer. Return which checkpoint it was, and Lightning's counters, which may be ignored."""
        return load_newest(source, self.megatron_module, control=self.control, data_key=self.data_key)
