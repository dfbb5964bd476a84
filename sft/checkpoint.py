"""Sharded checkpoints: written by all ranks, complete or absent, readable under another topology.

    step-00000010/
      sharded/        Megatron-core's distributed checkpoint: weights, optimizer, random generators
      trainer.json    Lightning's counters, topology, identity of the data, versions
      COMPLETE        written last: the size of every file

All is written into a hidden directory beside the target, synced, marked, and renamed. A full disk is met before the
first byte where the file system tells, and else leaves only the hidden directory, which the next save removes. The
sizes in the marker let a reader pass over a checkpoint that was cut short later.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from launcher.errors import CheckpointError, ConfigError
from launcher.rundir import COMPLETE, read_json, sync_directory
from launcher.topology import Topology
from sft.megatron import mends
from sft.megatron.distributed import ControlGroup
from sft.megatron.mcore import (
    CheckpointingException,
    ShardedObject,
    dist_checkpointing,
    parallel_state,
    tensor_parallel,
)
from sft.megatron.mcore import __version__ as megatron_version

if TYPE_CHECKING:
    from sft.module import SFTGPT

FORMAT = 1
SHARDED = "sharded"
TRAINER = "trainer.json"
_SPACE_MARGIN = 1.02
"""File headers and metadata beside the tensors."""


def save_checkpoint(
    target: Path, counters: dict[str, Any], module: SFTGPT, *, control: ControlGroup, data_key: str
) -> None:
    """Write a complete checkpoint to `target`; all ranks call this, all raise CheckpointError or none does."""
    leader = torch.distributed.get_rank() == 0
    if control.any(leader and damage(target) is None):
        return
    aside = target.parent / f".{target.name}.partial"
    state = _sharded_state(module, loading=False)
    needed = control.total(_local_bytes(state))
    error: str | None = None
    try:
        if leader:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / SHARDED).mkdir(parents=True)
            _check_space(aside, needed)
    except OSError as problem:
        error = _describe(problem, aside)
    _raise_first(control, error, target, aside)
    try:
        dist_checkpointing.save(state, str(aside / SHARDED))
        if leader:
            _finish(aside, _trainer_state(counters, module.topology, data_key))
            shutil.rmtree(target, ignore_errors=True)  # a damaged one, or there would be nothing to write
            aside.rename(target)
            sync_directory(target.parent)
    except (OSError, RuntimeError, CheckpointException, CheckpointingException) as problem:
        error = _describe(problem, aside)
    _raise_first(control, error, target, aside)


def load_checkpoint(source: Path, module: SFTGPT, *, data_key: str) -> dict[str, Any]:
    """Fill model, optimizer and (on the same topology) random generators; returns Lightning's counters."""
    trainer = read_trainer_state(source)
    if trainer["data_key"] != data_key:
        raise ConfigError(
            f"{source} was written by a run over other data, order or batch size ({trainer['data_key'][:12]}, now "
            f"{data_key[:12]}); going on would repeat or skip examples. Put the data settings back, or start a new "
            "run with model.path set to the exported model"
        )
    same_topology = trainer["topology"] == dataclasses.asdict(module.topology)
    hyperparameters = [dict(group) for group in module.megatron_optimizer.param_groups]
    wanted = _sharded_state(module, loading=True, with_rng=same_topology)
    loaded = dist_checkpointing.load(wanted, str(source / SHARDED))
    for index, chunk in enumerate(module.chunks):
        chunk.module.load_state_dict(loaded[_chunk_key(index, len(module.chunks))])
    module.megatron_optimizer.load_state_dict(loaded["optimizer"])
    mends.unshare_steps(module.megatron_optimizer)
    _keep_hyperparameters(module, hyperparameters)
    if same_topology:
        _restore_rng(loaded["rng"])
    counters: dict[str, Any] = trainer["lightning"]
    return counters


def read_trainer_state(source: Path) -> dict[str, Any]:
    """trainer.json of a complete checkpoint; CheckpointError says what is wrong with it."""
    problem = damage(source)
    if problem:
        raise CheckpointError(f"checkpoint {source}: {problem}")
    state: dict[str, Any] = json.loads((source / TRAINER).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {source}: format {state.get('format')}, and this version reads {FORMAT}")
    return state


def newest_usable(checkpoints: list[Path]) -> Path | None:
    """The newest undamaged checkpoint of a list sorted by age; warns about each that is passed over."""
    for path in reversed(checkpoints):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged and passed over: {problem}", stacklevel=2)
    return None


def damage(source: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None: the files must be there in the size they were written."""
    try:
        marker = read_json(source / COMPLETE)
    except json.JSONDecodeError:
        return f"{COMPLETE} is not readable"
    if marker is None:
        return f"no {COMPLETE}: it was not finished"
    for name, size in marker["files"].items():
        try:
            found = (source / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, written were {size}"
    return None


def _sharded_state(module: SFTGPT, *, loading: bool, with_rng: bool = True) -> dict[str, Any]:
    """The sharded view of everything in a checkpoint. The metadata makes optimizer state readable at any tp/pp/dp."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    chunks = module.chunks
    state: dict[str, Any] = {
        _chunk_key(index, len(chunks)): chunk.module.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    if loading and module.spec.train.optimizer.distributed:
        mends.prime_states(module.megatron_optimizer)
    model = state if len(chunks) > 1 else state["model"]
    optimizer = module.megatron_optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return state | {"optimizer": optimizer} | ({"rng": _rng_state()} if with_rng else {})


def _chunk_key(index: int, count: int) -> str:
    return "model" if count == 1 else f"model{index}"


def _rng_state() -> ShardedObject:
    """Generators of this rank; every (pipeline, tensor, data) rank has its own."""
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
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
    return ShardedObject("rng", states, sizes, place)


def _restore_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _keep_hyperparameters(module: SFTGPT, groups: list[dict[str, Any]]) -> None:
    """The config of this attempt decides learning rate, decay and betas, not the one that wrote the checkpoint."""
    for group, configured in zip(module.megatron_optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in configured.items() if key not in ("params", "step")})


def _trainer_state(counters: dict[str, Any], topology: Topology, data_key: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "lightning": counters,
        "topology": dataclasses.asdict(topology),
        "data_key": data_key,
        "versions": {"torch": torch.__version__, "megatron_core": megatron_version},
    }


def _finish(aside: Path, trainer: dict[str, Any]) -> None:
    """Write what rank 0 writes alone, then the marker; everything synced."""
    _write_synced(aside / TRAINER, json.dumps(trainer, indent=1))
    files = {str(path.relative_to(aside)): path.stat().st_size for path in sorted(aside.rglob("*")) if path.is_file()}
    for name in files:
        _sync_file(aside / name)
    sync_directory(aside / SHARDED)
    _write_synced(aside / COMPLETE, json.dumps({"files": files}, indent=1))
    sync_directory(aside)


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync_file(path)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _local_bytes(state: Any) -> int:
    """Bytes of the tensors that this rank holds in `state`; replicas are counted on each, an upper bound."""
    if isinstance(state, dict):
        return sum(_local_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(_local_bytes(value) for value in state)
    replica = getattr(state, "replica_id", 0)
    if any(replica) if isinstance(replica, tuple) else replica:
        return 0
    data = getattr(state, "data", None)
    return data.numel() * data.element_size() if isinstance(data, torch.Tensor) else 0


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed * _SPACE_MARGIN > free:
        raise OSError(
            f"it needs about {needed * _SPACE_MARGIN / 2**20:,.0f} MiB, "
            f"and {free / 2**20:,.0f} MiB are free in {directory.parent}"
        )


def _describe(problem: BaseException, aside: Path) -> str:
    text = str(problem).strip().splitlines()
    return text[-1] if text else type(problem).__name__


def _raise_first(control: ControlGroup, error: str | None, target: Path, aside: Path) -> None:
    """Raise on all ranks what went wrong on one, after the partial directory is gone."""
    first = control.first_error(error)
    if first is None:
        return
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    raise CheckpointError(
        f"checkpoint {target.name} was not written: {first}; earlier complete checkpoints are untouched. "
        "Free space or set checkpoint.keep_last lower, then resubmit"
    )
