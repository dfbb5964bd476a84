"""Find the copies in memory of a run that makes some, before its model is built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from launcher.contract.copy_folder import copy_folder, start_of
from launcher.contract.job import AttemptName
from launcher.contract.rundir import RunPaths, checkpoint_step
from launcher.contract.topology import Topology
from sft.checkpoint.copy_choice import Choice
from sft.checkpoint.memory_copies import MemoryCopies, NodePlace
from sft.metrics.run_log import RunLog
from sft.models.architecture import Architecture
from sft.models.numerics import numerics
from sft.runtime.rank_env import RankEnv, node_name
from sft.training.strategy import MegatronStrategy


def resume_point_with_copies(
    strategy: MegatronStrategy,
    checkpoint: Path | None,
    paths: RunPaths,
    env: RankEnv,
    architecture: Architecture,
    log: RunLog,
) -> Path | None:
    """Return what to resume from: the copies' folder where one is newer than `checkpoint`, else `checkpoint`.

    Every rank calls this. It starts the process groups, and gives the strategy its copies, if there can be any.
    """
    start = start_of(env.attempt)
    if start is None:
        log.say(f"no copies in memory: attempt {env.attempt} belongs to no job that would go on from them")
        return checkpoint
    node = node_name()
    topology = strategy.topology
    nodes = topology.world_size // topology.ranks_per_node
    place = NodePlace(rank=env.rank, ranks_per_node=topology.ranks_per_node, nodes=nodes, node=node)
    folder = copy_folder(paths.root, start, node)
    strategy.setup_environment()
    identity = _identity(paths, start, topology, strategy.data_key, architecture)
    copies = MemoryCopies(folder, paths.root, place, strategy.control, attempt=env.attempt, identity=identity)
    problem = copies.open()
    if problem is not None:
        log.say(f"no copies in memory: {problem}")
        log.event("copies_off", reason=problem)
        return checkpoint
    strategy.copies = copies
    if AttemptName(env.attempt).generation == 0:  # nothing has been started in place yet
        copies.forget()
        return checkpoint
    return _newer_copy(strategy, copies, checkpoint, log)


def _newer_copy(strategy: MegatronStrategy, copies: MemoryCopies, checkpoint: Path | None, log: RunLog) -> Path | None:
    saved = strategy.control.from_leader(0 if checkpoint is None else checkpoint_step(checkpoint))
    found = copies.look(saved)
    if isinstance(found, Choice):
        fetched = f"; ranks {', '.join(map(str, found.fetched))} have theirs from other nodes" if found.fetched else ""
        log.say(f"going on from the copy of step {found.step}, which attempt {found.attempt} made{fetched}")
        log.event("copy_used", step=found.step, made_by=found.attempt, fetched=list(found.fetched))
        return copies.folder
    source = "from the start" if checkpoint is None else f"from {checkpoint.name}"
    log.say(f"going on {source}, not from a copy in memory: {found}")
    log.event("copy_not_used", step=saved, reason=found)
    return checkpoint


def _identity(
    paths: RunPaths, start: str, topology: Topology, data_key: Mapping[str, object], architecture: Architecture
) -> str:
    """Return a digest of all that must be the same where a copy is gone on from."""
    same = {
        "run": str(paths.root),
        "start": start,
        "config": hashlib.sha256(paths.config.read_bytes()).hexdigest(),
        "topology": dataclasses.asdict(topology),
        "data": dict(data_key),
        "model": numerics(architecture),  # config.json may be edited while the job goes on
    }
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
