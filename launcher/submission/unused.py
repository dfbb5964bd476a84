"""Settings that have no effect while something else is as it is: said, and not refused, so that it can be switched."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec import RunSpec

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_OF_A_QUEUE = (
    *("partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude", "exclusive"),
    *("memory_per_node", "extra_sbatch"),
)
"""Keys of `resources` that only a scheduler with a queue reads."""


_OF_A_QUEUES_JOBS = ("node_seconds", "preempted", "timeout", "node_failure", "bad_node")
"""Keys of `restart` for what only befalls a scheduler's jobs: a local run ends with its time limit."""


def unused_settings(spec: RunSpec) -> Iterator[tuple[list[str], str]]:
    """Yield keys that somebody has set, and why nothing reads them in this run."""
    cluster = spec.cluster
    if not CAPABILITIES[cluster.scheduler].allocates_nodes:
        names = _given("resources", spec.resources, _OF_A_QUEUE)
        names += ["cluster.srun_args"] if cluster.srun_args else []
        names += _given("restart", spec.restart, _OF_A_QUEUES_JOBS)
        yield names, f"cluster {cluster.name} has no queue"
    if not spec.watchdog.enabled:
        yield _given("watchdog", spec.watchdog, but=("enabled",)), "watchdog.enabled is false"
    if not spec.has_preflight:
        why = "off" if spec.preflight.enabled == "off" else "auto: there are neither several nodes nor GPUs to test"
        yield _given("preflight", spec.preflight, but=("enabled",)), f"preflight.enabled is {why}"
    if spec.restart.how == "none":
        yield _given("restart", spec.restart, but=("how", "node_seconds")), "restart.how is none"


def _given(
    section: str, given: DataclassInstance, names: Collection[str] = (), *, but: Collection[str] = ()
) -> list[str]:
    """Return the keys of a section that are not at their defaults: of `names`, or all `but` some."""
    unset = type(given)()
    return [
        f"{section}.{item.name}"
        for item in dataclasses.fields(given)
        if (item.name in names or not names) and item.name not in but
        if getattr(given, item.name) != getattr(unset, item.name)
    ]
