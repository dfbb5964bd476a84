"""Checks of cluster and scheduler settings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.secret_names import is_secret_name
from launcher.contract.spec import RestartSpec, RunSpec
from launcher.contract.spec.fields import Problem, field_problems, values_under
from launcher.contract.spec.rules import ENVIRONMENT_NAME, SHELL_VARIABLE, shown
from launcher.contract.time_limit import time_limit_minutes

_OUR_VARIABLES = ("SLURM_", "SFT_")
_OF_RANKS = re.compile(
    r"SFT_.*|SLURM_(JOB|STEP|TASK|NTASKS|PROCID|LOCALID|NODEID|NNODES|RESTART|CLUSTER_NAME).*"
    r"|(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)
"""Variables by which a process knows its run and its rank: with others it would be another."""


def environment_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield variables that would store a secret, and secrets that something else sets."""
    cluster = spec.cluster
    for name in cluster.env:
        if ENVIRONMENT_NAME.allows(name) and is_secret_name(name):
            yield (
                "cluster.env",
                f"{name} looks like a secret, and would be stored in the run directory; "
                f"name it in env_from: [{name}] instead, and export it in your shell",
            )
        elif _OF_RANKS.fullmatch(name):
            yield "cluster.env", f"{name} is set by the launcher or Slurm, for each attempt and rank; drop it"
    for key, name in values_under(spec, SHELL_VARIABLE):
        if name in cluster.env:
            yield key, f"{name} is set by cluster.env; drop one"
        elif name.startswith(_OUR_VARIABLES) or _OF_RANKS.fullmatch(name):
            yield key, f"{name} is set by the launcher; drop it"


def scheduler_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield what the scheduler could not do."""
    resources, cluster = spec.resources, spec.cluster
    if not CAPABILITIES[cluster.scheduler].allocates_nodes and resources.nodes > 1:
        yield (
            "resources.nodes",
            f"{resources.nodes} on cluster {cluster.name}, which is this machine alone; set it to 1",
        )
    if spec.preflight.enabled == "on" and not CAPABILITIES[cluster.scheduler].allocates_nodes:
        yield "preflight.enabled", f"on with cluster {cluster.name}, which is this machine alone; set it to auto"
    yield from _notice_problems(spec)
    yield from _in_place_problems(spec)
    yield from _copy_problems(spec)
    if set("%\\") & set(spec.run_root):  # both mean something in sbatch's --output and in submitit's folders
        yield "run_root", f"{spec.run_root!r} holds % or a backslash, which Slurm reads as part of a pattern"
    if ":" in spec.run_root:  # ranks would run the launcher that is installed, not the run's own code
        yield "run_root", f"{spec.run_root!r} holds a colon, at which PYTHONPATH divides the path of the run's code"


def _notice_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield a notice before the time limit that is longer than the limit: each attempt would end at its first step."""
    resources = spec.resources
    if any(field_problems(resources, "time")):
        return
    seconds = 60 * (time_limit_minutes(resources.time) or 0)  # Slurm reads 0 as no limit
    if 0 < seconds <= resources.signal_seconds:
        yield (
            "resources.signal_seconds",
            f"{resources.signal_seconds} is not below the {seconds:.0f} s of resources.time {resources.time}, so that "
            "ranks would be told to stop as they start; lower it, or give more time",
        )


def _in_place_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield what a restart in place, or nodes held for one, would ask in vain."""
    resources, cluster = spec.resources, spec.cluster
    can = CAPABILITIES[cluster.scheduler]
    in_place = spec.restart.how == "in_place"
    if in_place and not can.restarts_in_place:
        yield "restart.how", f"in_place: jobs of cluster {cluster.name} cannot start their ranks again; use requeue"
    seconds = spec.restart.node_seconds
    if not in_place and seconds != RestartSpec().node_seconds and not any(field_problems(spec.restart, "node_seconds")):
        yield (
            "restart.node_seconds",
            f"{shown(seconds)} with restart.how {spec.restart.how}: only restart.how in_place waits for nodes; drop it",
        )
    if not resources.spare_nodes:
        return
    if not can.allocates_nodes:
        why = f"{resources.spare_nodes} on cluster {cluster.name}, which is this machine alone; set it to 0"
        yield "resources.spare_nodes", why
    elif not in_place:
        yield (
            "resources.spare_nodes",
            f"{resources.spare_nodes} with restart.how {spec.restart.how}: only restart.how in_place uses spare nodes, "
            "and they would be paid for in vain; set one of the two",
        )


def _copy_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield why copies in memory would be made in vain."""
    key, every, saved = "checkpoint.copy_every", spec.checkpoint.copy_every, spec.checkpoint.every
    if every is None:
        return
    if spec.restart.how != "in_place":
        yield key, f"{every} with restart.how {spec.restart.how}: only restart.how in_place goes on from copies"
    elif not CAPABILITIES[spec.cluster.scheduler].allocates_nodes:
        yield key, f"{every} on cluster {spec.cluster.name}, which is this machine alone; leave it out"
    if saved is not None and every >= saved:
        yield key, f"{every} is not below checkpoint.every {saved}: no copy would be newer than the newest checkpoint"


def runtime_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield what a kind of runtime needs and lacks."""
    runtime = spec.cluster.runtime
    if runtime.kind in ("venv", "conda") and not runtime.path:
        yield "cluster.runtime.path", f"missing; runtime kind {runtime.kind} needs it"
    if runtime.kind in ("pyxis", "apptainer") and not runtime.image:
        yield "cluster.runtime.image", f"missing; runtime kind {runtime.kind} needs it"
    if runtime.kind not in ("pyxis", "apptainer"):
        for name, value in (("image", runtime.image), ("mounts", runtime.mounts)):
            if value and not any(field_problems(runtime, name)):
                yield f"cluster.runtime.{name}", f"{shown(value)}: runtime kind {runtime.kind} starts no container"
    if runtime.path and runtime.kind not in ("venv", "conda"):
        yield (
            "cluster.runtime.path",
            f"{runtime.path}: only runtime kinds venv and conda activate one, not {runtime.kind}",
        )
    if runtime.kind == "pyxis" and not CAPABILITIES[spec.cluster.scheduler].srun:
        yield "cluster.runtime.kind", "pyxis is an extension of srun; a local run can use apptainer"
