"""Read a checkpoint back, under the topology it was saved with or another one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch

from launcher.contract.errors import CheckpointError
from launcher.contract.rundir import checkpoint_step, complete_checkpoints
from launcher.contract.versions import parse_version
from sft.checkpoint.contents import SHARDED, TrainerState
from sft.checkpoint.files import changed_bytes, damage
from sft.checkpoint.pickles import refuse_code
from sft.checkpoint.same_model import check_base_weights
from sft.checkpoint.same_run import check_same_run
from sft.megatron.core import ShardedObject, dist_checkpointing, parallel_state, tensor_parallel
from sft.megatron.core import __version__ as megatron_version
from sft.megatron.parallel.groups import ControlGroup
from sft.megatron.patches import adamw_state

# From here on, what is no tensor is in the sharded files. Later versions read common.pt of earlier ones as well.
_COMMON_MOVED_IN = "0.19"
_COMMON_MOVED = parse_version(_COMMON_MOVED_IN)

if TYPE_CHECKING:
    from sft.engine.module import SFTGPT


class RngStates(TypedDict):
    """The random generators of a rank."""

    torch: torch.Tensor
    tracker: dict[str, torch.Tensor]
    cuda: NotRequired[torch.Tensor]


def load_newest(
    source: Path, module: SFTGPT, *, control: ControlGroup, data_key: Mapping[str, object]
) -> tuple[Path, dict[str, object]]:
    """Load `source` or, where it is damaged, the newest older checkpoint that is not.

    Returns the checkpoint that was loaded and Lightning's counters. Each rank compares the checksums of some of the
    files, and all ranks agree on the checkpoint. CheckpointError where all are damaged.
    """
    older = [path for path in complete_checkpoints(source.parent) if checkpoint_step(path) < checkpoint_step(source)]
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problem: str | None = None
    for path in (source, *reversed(older)):
        found = damage(path) or changed_bytes(path, share=rank, shares=size)
        problem = control.first_error(found)
        if problem is None:
            return path, load_checkpoint(path, module, data_key=data_key)
        if rank == 0:
            warnings.warn(f"checkpoint {path} is damaged and skipped: {problem}", stacklevel=2)
    raise CheckpointError(
        f"every checkpoint in {source.parent} is damaged; of the last one tried, {problem}. Remove them to start again"
    )


def load_checkpoint(source: Path, module: SFTGPT, *, data_key: Mapping[str, object]) -> dict[str, object]:
    """Fill model, optimizer and, under the same topology, random generators. Return Lightning's counters.

    ConfigError where the run has other data, adapters or another model than the one that wrote the checkpoint.
    """
    trainer = read_trainer_state(source)
    check_same_run(source, trainer, module.spec, module.architecture, data_key)
    if module.spec.model.lora.rank is not None:
        check_base_weights(source, trainer, str(module.model_chunks[0].module.base_weights))
    _check_version(source, trainer)
    refuse_code(source / SHARDED)
    same_topology = trainer.is_of(module.topology)
    hyperparameters = [dict(group) for group in module.megatron_optimizer.param_groups]
    wanted = sharded_state(module, loading=True, with_rng=same_topology)
    loaded = dist_checkpointing.load(wanted, str(source / SHARDED))
    for index, chunk in enumerate(module.model_chunks):
        chunk.module.load_state_dict(loaded[_chunk_key(index, len(module.model_chunks))])
    _take_rates(loaded["optimizer"], {name: hyperparameters[0][name] for name in ("max_lr", "min_lr")})
    module.megatron_optimizer.load_state_dict(loaded["optimizer"])
    adamw_state.unshare_steps(module.megatron_optimizer)
    _keep_hyperparameters(module, hyperparameters)
    if same_topology:
        restore_rng(loaded["rng"])
    return dict(trainer.lightning)


def _check_version(source: Path, trainer: TrainerState) -> None:
    """Raise CheckpointError where this Megatron-core looks for a file that the one that wrote it no longer has."""
    writer = trainer.versions.get("megatron_core", "")
    if parse_version(writer) >= _COMMON_MOVED > parse_version(megatron_version):
        raise CheckpointError(
            f"{source} was written with Megatron-core {writer}, and {megatron_version} cannot read it: the "
            f"files changed in {_COMMON_MOVED_IN}; install megatron-core>={_COMMON_MOVED_IN} for the ranks"
        )


def read_trainer_state(source: Path) -> TrainerState:
    """Read trainer.json of a complete checkpoint. CheckpointError says what is wrong with it."""
    problem = damage(source)
    if problem:
        raise CheckpointError(f"checkpoint {source}: {problem}")
    return TrainerState.read(source)


def newest_usable(checkpoints: list[Path]) -> Path | None:
    """Return the newest checkpoint, of a list from old to new, whose files are complete. Warn about those skipped."""
    for path in reversed(checkpoints):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged and skipped: {problem}", stacklevel=2)
    return None


def sharded_state(module: SFTGPT, *, loading: bool, with_rng: bool = True) -> dict[str, object]:
    """Return the sharded view of everything in a checkpoint."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",  # readable under any tp, pp, dp and ep
        "chained_optim_avoid_prefix": True,  # the state of experts has names of its own already
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    chunks = module.model_chunks
    state: dict[str, object] = {
        _chunk_key(index, len(chunks)): chunk.module.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    if loading and module.spec.train.optimizer.distributed:
        adamw_state.prime_states(module.megatron_optimizer)
    model = state if len(chunks) > 1 else state["model"]
    optimizer = module.megatron_optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return state | {"optimizer": optimizer} | ({"rng": _rng_state()} if with_rng else {})


def _chunk_key(index: int, count: int) -> str:
    return "model" if count == 1 else f"model{index}"


def _rng_state() -> ShardedObject:
    """Return the random generators of this rank. Every (pipeline, tensor, data) rank has its own."""
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    return ShardedObject("rng", rng_states(), sizes, place)


def rng_states() -> RngStates:
    """Return the states of this rank's random generators."""
    states: RngStates = {
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: RngStates) -> None:
    """Set this rank's random generators to what `rng_states` gave."""
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _take_rates(state: object, rates: Mapping[str, object]) -> None:
    """Put this attempt's learning rates into the groups of a loaded optimizer state, at any depth.

    Megatron-core 0.19 finds its own groups among them by their rates, which a resumed run may change.
    """
    if isinstance(state, dict):
        for group in state.get("param_groups", ()):
            group.update(rates)
        for inner in state.values():
            _take_rates(inner, rates)


def _keep_hyperparameters(module: SFTGPT, groups: list[dict[str, object]]) -> None:
    """Put back the hyperparameters of this attempt's config, over those that came with the checkpoint."""
    for group, configured in zip(module.megatron_optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in configured.items() if key not in ("params", "step")})
