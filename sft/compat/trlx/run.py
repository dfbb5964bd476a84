"""Make a run directory like any other from settings and samples, and train it on all ranks that were started.

Every rank computes the same config by itself. Rank 0 writes the directory and prepares the run (model conversion, token
cache). The others wait for a file that rank 0 writes when it is done, as ranks wait for a token cache
(sft.data.prepared.prepare).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from launcher.contract.config.load import checked_spec
from launcher.contract.errors import ConfigError, DataError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.leaves import Leaf, Leaves
from launcher.contract.manifest import describe_run, write_manifest
from launcher.contract.rundir import RunPaths, append_event, complete_checkpoints, write_atomic
from launcher.contract.spec import RunSpec, sealed, to_yaml
from launcher.contract.topology import build_topology
from sft.commands.export import export
from sft.commands.prepare import prepare
from sft.compat.trlx.samples import Tokens
from sft.data.prepared.prepare import WAIT_SECONDS
from sft.generation.evaluation_prompts import Metric
from sft.megatron.core import parallel_state
from sft.runtime.rank_env import RankEnv
from sft.training.trainer import train_run

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What a run is made of besides its settings."""

    samples: Sequence[Tokens]
    prompts: Sequence[Mapping[str, object]]
    """Rows with prompt and input_ids. Empty: no prompts are answered."""
    model: Mapping[str, object] | None
    """The config.json of a model that starts from random weights. None: the settings name a model."""


def make_spec(values: Mapping[str, Leaf], material: Material, paths: RunPaths, env: RankEnv) -> RunSpec:
    """Return the run's config, the same on every rank, after rank 0 has written the files that it names.

    Raise ConfigError with every problem.
    """
    files = {"data.train": Leaf([_file(paths, "samples", _lines(map(_row, material.samples)), env)], "file", "samples")}
    if material.prompts:
        prompts = _file(paths, "eval_prompts", _lines(material.prompts), env)
        files["evaluation.prompts"] = Leaf(prompts, "file", "eval_prompts")
    if material.model is not None:
        config = _file(paths, "model", json.dumps(material.model, indent=2) + "\n", env, name="config.json")
        files["model.path"] = Leaf(str(Path(config).parent), "file", "megatron_cfg")
        files["model.init"] = Leaf("random", "file", "megatron_cfg")
    place = {"run_root": str(paths.root.parent), "name": paths.root.name}
    files |= {key: Leaf(value, "file", "the run's directory") for key, value in place.items()}
    spec = checked_spec(Leaves(values={**values, **files}), "trlx config")
    if spec.resources.world_size != env.world_size:
        raise ConfigError(
            f"trainer.devices {spec.resources.ranks_per_node} x trainer.num_nodes {spec.resources.nodes} = "
            f"{spec.resources.world_size} ranks, but {env.world_size} were started; start the program once for each, "
            f"with srun, with torchrun --nproc-per-node {spec.resources.ranks_per_node}, or with python -m "
            f"launcher.contract.local_ranks --ranks {spec.resources.world_size}"
        )
    return spec


def run(spec: RunSpec, paths: RunPaths, metric: Metric | None, env: RankEnv) -> None:
    """Prepare, train and export, on every rank. Raise SystemExit with the exit code of a run that was stopped early."""
    mark = paths.root / ".prepared" / hashlib.sha256(to_yaml(spec).encode()).hexdigest()[:40]
    if env.rank == 0:
        _begin(spec, paths, env)
        write_atomic(mark, "")
    _wait_for(mark)
    code = ExitCode.FAILURE
    try:
        code = train_run(spec, paths, metric)
    finally:
        _leave_groups()
        if env.rank == 0 and code != ExitCode.OK:
            append_event(paths, "attempt_ended", attempt=env.attempt, exit_code=int(code))
    if code != ExitCode.OK:
        raise SystemExit(int(code))
    if env.rank == 0:
        if spec.checkpoint.export:
            export(paths.root)
        append_event(paths, "attempt_ended", attempt=env.attempt, exit_code=0)


def resume_point(given: str, paths: RunPaths) -> str | None:
    """Return the checkpoint that train.resume_from_checkpoint means: `given` itself, or the newest of a run.

    Return None if it is one of this run's own, from which the run resumes by itself.
    """
    place = Path(given).absolute()
    if paths.root in (place, place.parent, place.parent.parent):
        return None
    checkpoints = [*complete_checkpoints(place), *complete_checkpoints(RunPaths(place).checkpoints)]
    return str(checkpoints[-1] if checkpoints else place)


def refuse_other_run(paths: RunPaths, *, resumes: bool) -> None:
    """Raise ConfigError if the directory holds checkpoints and the run should not resume from them."""
    if paths.complete_checkpoints() and not resumes:
        raise ConfigError(
            f"{paths.root} already holds checkpoints of a run; to resume it set exp_manager.resume_if_exists: True "
            f"or train.resume_from_checkpoint={str(paths.root)!r}, else give another directory (train.checkpoint_dir, "
            "train.run_name, exp_manager.explicit_log_dir)"
        )


def _begin(spec: RunSpec, paths: RunPaths, env: RankEnv) -> None:
    """Do what `launcher submit` and the first step of the batch script do."""
    write_atomic(paths.config, sealed(spec))
    if not paths.manifest.is_file():
        manifest, _ = describe_run(paths.name, build_topology(spec, None), sys.argv, None)
        write_manifest(paths, manifest)
    append_event(paths, "attempt_started", attempt=env.attempt, job_id=str(os.getpid()), host=os.uname().nodename)
    prepare(paths.config)


def _row(sample: Tokens) -> Mapping[str, object]:
    return dataclasses.asdict(sample)


def _lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _file(paths: RunPaths, kind: str, text: str, env: RankEnv, name: str | None = None) -> str:
    """Return the path of a file of the run, after rank 0 has written it."""
    # Named by its content, so that no rank takes the file of an earlier start for this one.
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = paths.root / "input" / (f"{kind}-{digest}/{name}" if name else f"{kind}-{digest}.jsonl")
    if env.rank == 0 and not path.is_file():
        write_atomic(path, text)
    _wait_for(path)
    return str(path)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise DataError(f"{path} did not appear in {WAIT_SECONDS:.0f} s; do all nodes share this file system?")
        time.sleep(_POLL_SECONDS)


def _leave_groups() -> None:
    """Destroy the process groups, so that the program can train again."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
