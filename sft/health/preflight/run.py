"""`python -m sft preflight`: one task on every node, before training, to find nodes that would spoil the run.

The nodes meet in a store on the first one, check themselves, compare clocks, and all-reduce in pairs. The first node
collects the reports, prints a table and decides: exit code 77 with the bad nodes named, or 74 or 2 for a fault of the
run. A node that does not report in time is bad. The exit codes of the other tasks do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, append_event, write_json
from launcher.contract.spec import RunSpec, read_resolved
from sft.health.preflight import checks
from sft.health.preflight.checks import Check
from sft.health.preflight.meeting import POLL_SECONDS, clock_offset, host_meeting, meet_partners
from sft.health.preflight.report import Report, combine, table
from sft.runtime.rank_env import RankEnv, node_name

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def preflight(config: Path) -> ExitCode:
    """Check this node and, on the first one, decide for all. Return this task's exit code."""
    spec, paths, env = read_resolved(config), RunPaths(config.resolve().parent), RankEnv.from_environ()
    began = time.monotonic()
    store = _store(env, spec.preflight.timeout_seconds)
    host = node_name()
    store.set(f"host/{env.rank}", host)
    if env.rank == 0:
        # A connection of its own, because a wait blocks the connection that it is on.
        connection = _store(env, spec.preflight.timeout_seconds, serve=False)
        deadline = began + 0.5 * spec.preflight.timeout_seconds
        threading.Thread(target=host_meeting, args=(connection, env.world_size, deadline), daemon=True).start()
    report = _check_node(spec, paths, env, host, store, began)
    store.set(f"report/{env.rank}", json.dumps(dataclasses.asdict(report)))
    if env.rank != 0:
        with contextlib.suppress(Exception):  # the first node serves the store until it has decided
            store.wait(["decision"], timedelta(seconds=spec.preflight.timeout_seconds))
        return ExitCode.OK
    reports = _collect(store, env.world_size, began + 0.9 * spec.preflight.timeout_seconds)
    results = combine(reports, _hosts(store, env.world_size))
    code = _conclude(paths, env.attempt, results, time.monotonic() - began)
    store.set("decision", str(int(code)))
    return code


def _store(env: RankEnv, seconds: float, *, serve: bool = True) -> Store:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    serves = serve and env.rank == 0
    wait = timedelta(seconds=seconds)
    return TCPStore(env.master_addr, env.master_port, is_master=serves, wait_for_workers=False, timeout=wait)


def _check_node(spec: RunSpec, paths: RunPaths, env: RankEnv, host: str, store: Store, began: float) -> Report:
    wanted, limit = spec.preflight, spec.preflight.timeout_seconds
    versions = checks.node_versions()
    own_checks = [
        checks.check_gpus(spec.resources.gpus_per_node),
        checks.check_shm(wanted.min_shm_mib),
        checks.check_limits(),
        checks.check_run_directory(paths.checkpoints, host, wanted.min_disk_gib),
        checks.check_packages(versions),
        checks.check_clock(*clock_offset(store, env.rank, 0.2 * limit), wanted.max_clock_skew_seconds),
    ]
    pairs = meet_partners(store, env, began, limit)
    return Report(node=env.rank, host=host, checks=own_checks, versions=versions, pairs=pairs)


def _collect(store: Store, nodes: int, deadline: float) -> list[Report]:
    """Return the reports of all nodes that give one before `deadline` (by time.monotonic)."""
    reports: dict[int, Report] = {}
    while len(reports) < nodes and time.monotonic() < deadline:
        for node in set(range(nodes)) - set(reports):
            if store.check([f"report/{node}"]):
                reports[node] = Report.from_json(json.loads(store.get(f"report/{node}")))
        time.sleep(POLL_SECONDS)
    return [reports[node] for node in sorted(reports)]


def _hosts(store: Store, nodes: int) -> list[str]:
    """Return the host of each task. That of a task which never started is in Slurm's list, which the script passes."""
    listed = os.environ.get("SFT_HOSTS", "").split()
    return [
        store.get(f"host/{node}").decode()
        if store.check([f"host/{node}"])
        else (listed[node] if node < len(listed) else f"task {node}")
        for node in range(nodes)
    ]


def _conclude(paths: RunPaths, attempt: str, results: Mapping[str, list[Check]], seconds: float) -> ExitCode:
    """Print the table, write the file and the event, and return the exit code."""
    all_checks = [check for found in results.values() for check in found]
    packages = [f"packages: {check.detail}\n" for check in all_checks if check.name == "packages" and check.ok]
    print(
        f"{table(results)}\n{''.join(packages[:1])}preflight of {len(results)} nodes took {seconds:.1f} s", flush=True
    )
    nodes = [
        {"host": host, "checks": [dataclasses.asdict(check) for check in found]} for host, found in results.items()
    ]
    with contextlib.suppress(OSError):  # a full disk may be what the checks have found
        write_json(paths.preflight(attempt), {"attempt": attempt, "seconds": round(seconds, 1), "nodes": nodes})
    bad = [
        {"host": host, "checks": [dataclasses.asdict(check) for check in found if not check.ok]}
        for host, found in results.items()
        if any(not check.ok and check.fault == "node" for check in found)
    ]
    of_the_run = {check.name for check in all_checks if not check.ok and check.fault == "run"}
    if of_the_run:
        return ExitCode.BAD_INPUT if of_the_run & {"packages", "limits"} else ExitCode.IO_ERROR
    if not bad:
        return ExitCode.OK
    append_event(paths, "preflight_failed", attempt=attempt, nodes=bad)
    return ExitCode.BAD_NODE
