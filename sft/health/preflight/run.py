"""`python -m sft preflight`: one task on every node, before training; finds a node that would spoil the run.

The nodes meet in a store on the first one, look at themselves, compare clocks, and all-reduce in pairs. The first
collects what they found, prints the table, and decides: 77 with the bad nodes named, 74 where the shared file system
cannot be written from anywhere. A node that says nothing in time is bad. The other tasks' exit codes do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, append_event, write_json
from launcher.contract.spec import RunSpec, read_resolved
from sft.health.preflight import checks
from sft.health.preflight.checks import Check
from sft.health.preflight.pairs import all_reduce, blame, rounds
from sft.runtime.rank_env import RankEnv

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one node found; `pairs` is what went wrong with each partner, or None."""

    node: int
    host: str
    checks: list[Check]
    versions: dict[str, str]
    pairs: dict[int, str | None] = field(default_factory=dict)


def preflight(config: Path) -> ExitCode:
    """Run this node's part; on the first node also everybody's verdict."""
    spec, paths, env = read_resolved(config), RunPaths(config.resolve().parent), RankEnv.from_environ()
    began = time.monotonic()
    store = _store(env, spec.preflight.timeout_seconds)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    store.set(f"host/{env.rank}", host)
    leader = env.rank == 0
    if leader:
        meeting = _store(env, spec.preflight.timeout_seconds, serve=False)  # its own connection: waits hold the other
        deadline = began + 0.5 * spec.preflight.timeout_seconds
        threading.Thread(target=_host_meeting, args=(meeting, env.world_size, deadline), daemon=True).start()
    report = _look(spec, paths, env, host, store, began)
    store.set(f"report/{env.rank}", json.dumps(dataclasses.asdict(report)))
    if not leader:
        with contextlib.suppress(Exception):  # the verdict is the first node's; it serves the store until it has one
            store.wait(["verdict"], timedelta(seconds=spec.preflight.timeout_seconds))
        return ExitCode.OK
    reports = _collect(store, env.world_size, began + 0.9 * spec.preflight.timeout_seconds)
    hosts = _hosts(store, env.world_size)
    verdict = judge(reports, hosts)
    code = _tell(paths, env.attempt, verdict, time.monotonic() - began)
    store.set("verdict", str(int(code)))
    return code


def _store(env: RankEnv, seconds: float, *, serve: bool = True) -> Store:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    serves = serve and env.rank == 0
    wait = timedelta(seconds=seconds)
    return TCPStore(env.master_addr, env.master_port, is_master=serves, wait_for_workers=False, timeout=wait)


def _look(spec: RunSpec, paths: RunPaths, env: RankEnv, host: str, store: Store, began: float) -> Report:
    wanted, limit = spec.preflight, spec.preflight.timeout_seconds
    versions = checks.node_versions()
    found = [
        checks.check_gpus(spec.resources.gpus_per_node),
        checks.check_shm(wanted.min_shm_mib),
        checks.check_run_directory(paths.checkpoints, host, wanted.min_disk_gib),
        checks.check_packages(versions),
        checks.check_clock(*_clock_offset(store, env.rank, 0.2 * limit), wanted.max_clock_skew_seconds),
    ]
    pairs = _meet_partners(store, env, began, limit)
    return Report(node=env.rank, host=host, checks=found, versions=versions, pairs=pairs)


def _clock_offset(store: Store, node: int, seconds: float) -> tuple[float, float]:
    """How far this clock is before the first node's, and the uncertainty: half of the time the answer took."""
    if node == 0:
        return 0.0, 0.0
    asked = time.time()
    store.set(f"ping/{node}", "1")
    try:
        store.wait([f"pong/{node}"], timedelta(seconds=seconds))
    except Exception:  # torch raises several kinds: no answer is no knowledge
        return 0.0, seconds
    answered = time.time()
    theirs = float(store.get(f"pong/{node}"))
    return (asked + answered) / 2 - theirs, (answered - asked) / 2


def _host_meeting(store: Store, nodes: int, deadline: float) -> None:
    """On the first node: tell the others its time when they ask, and who is there once all are, or at the deadline."""
    unasked, present, told = set(range(1, nodes)), set[int](), False
    while unasked or not told:
        for node in [node for node in unasked if store.check([f"ping/{node}"])]:
            store.set(f"pong/{node}", repr(time.time()))
            unasked.remove(node)
        present |= {node for node in set(range(nodes)) - present if store.check([f"here/{node}"])}
        if not told and (len(present) == nodes or time.monotonic() > deadline):
            store.set("present", json.dumps(sorted(present)))
            told = True
        time.sleep(_POLL_SECONDS)


def _meet_partners(store: Store, env: RankEnv, began: float, limit: float) -> dict[int, str | None]:
    """All-reduce with the partner of each round.

    Rounds begin together, and without the nodes that are not there. Each has its share of the time that is left, and
    what the rounds before it did not use: a partner may have waited in vain until their end.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout is an error, not the end of the process
    store.set(f"here/{env.rank}", "1")
    store.wait(["present"], timedelta(seconds=limit))
    present: list[int] = json.loads(store.get("present"))
    if env.rank not in present:
        return {}
    plan = rounds(len(present))
    start = time.monotonic()
    each = max(1.0, began + 0.8 * limit - start) / max(1, len(plan))
    found: dict[int, str | None] = {}
    for number, pairs in enumerate(plan):
        for low, high in [(present[low], present[high]) for low, high in pairs]:
            if env.rank in (low, high):
                left = start + (number + 1) * each - time.monotonic()
                name, place = f"pair/{number}/{low}", int(env.rank == high)
                found[low + high - env.rank] = all_reduce(store, name, place, left, on_gpu=on_gpu)
    return found


def _collect(store: Store, nodes: int, deadline: float) -> list[Report]:
    """Reports of all nodes that give one in time."""
    reports: dict[int, Report] = {}
    while len(reports) < nodes and time.monotonic() < deadline:
        for node in set(range(nodes)) - set(reports):
            if store.check([f"report/{node}"]):
                reports[node] = _read(json.loads(store.get(f"report/{node}")))
        time.sleep(_POLL_SECONDS)
    return [reports[node] for node in sorted(reports)]


def _read(values: dict[str, Any]) -> Report:
    pairs = {int(partner): problem for partner, problem in values["pairs"].items()}
    return Report(**{**values, "checks": [Check(**check) for check in values["checks"]], "pairs": pairs})


def _hosts(store: Store, nodes: int) -> list[str]:
    """The host of each task; a task that never started is known by Slurm's list alone, which the script hands down."""
    listed = os.environ.get("SFT_HOSTS", "").split()
    return [
        store.get(f"host/{node}").decode()
        if store.check([f"host/{node}"])
        else (listed[node] if node < len(listed) else f"task {node}")
        for node in range(nodes)
    ]


def judge(reports: Sequence[Report], hosts: Sequence[str]) -> dict[str, list[Check]]:
    """Host → its checks, those that take all nodes' reports included.

    What fails on more than half of several nodes is the run's fault: no other node would do better.
    """
    verdict: dict[str, list[Check]] = {}
    reference = checks.most_common([report.versions for report in reports])
    by_node = {report.node: report for report in reports}
    silent = [node for node in range(len(hosts)) if node not in by_node]
    results = {
        (min(report.node, partner), max(report.node, partner)): problem is None
        for report in reports
        for partner, problem in report.pairs.items()
    }
    for report in reports:  # a pair is good when both say so
        for partner, problem in report.pairs.items():
            if problem is not None:
                results[min(report.node, partner), max(report.node, partner)] = False
    blamed = blame(results, silent)
    for node, host in enumerate(hosts):
        if node in silent:
            verdict[host] = [Check(name="answer", ok=False, detail="no report in time")]
            continue
        report = by_node[node]
        found = [*report.checks, checks.check_versions(report.versions, reference)]
        if report.pairs:
            found.append(_pair_check(report, blamed.get(node, []), hosts))
        verdict[host] = found
    return _shared_faults(verdict)


def _pair_check(report: Report, failed: Sequence[int], hosts: Sequence[str]) -> Check:
    if not failed:
        met = ", ".join(hosts[partner] for partner, problem in report.pairs.items() if problem is None)
        return Check(name="all-reduce", ok=True, detail=f"with {met or 'no partner that could answer'}")
    why = next((problem for partner in failed if (problem := report.pairs.get(partner))), "the partner gave up")
    return Check(name="all-reduce", ok=False, detail=f"failed with {', '.join(hosts[n] for n in failed)}: {why}")


def _shared_faults(verdict: Mapping[str, list[Check]]) -> dict[str, list[Check]]:
    """Return the checks with the run at fault where most nodes cannot write its directory, or have its packages."""
    failing = Counter(check.name for found in verdict.values() for check in found if not check.ok)
    shared = [name for name in checks.SHARED_FAULTS if 2 * failing[name] > len(verdict)]
    return {
        host: [dataclasses.replace(check, fault="run") if check.name in shared else check for check in found]
        for host, found in verdict.items()
    }


def table(verdict: Mapping[str, Sequence[Check]]) -> str:
    """One line a node that is well, one more for each check that failed."""
    width = max(map(len, verdict))
    lines = []
    for host, found in verdict.items():
        bad = [check for check in found if not check.ok]
        names = ", ".join(check.name for check in found)
        lines.append(f"preflight  {host:<{width}}  {'FAILED' if bad else f'ok  ({names})'}")
        lines += [f"preflight  {'':<{width}}    {check.name}: {check.detail}" for check in bad]
    return "\n".join(lines)


def _tell(paths: RunPaths, attempt: str, verdict: Mapping[str, list[Check]], seconds: float) -> ExitCode:
    """Table, file, event and exit code."""
    all_checks = [check for found in verdict.values() for check in found]
    packages = [f"packages: {check.detail}\n" for check in all_checks if check.name == "packages" and check.ok]
    print(
        f"{table(verdict)}\n{''.join(packages[:1])}preflight of {len(verdict)} nodes took {seconds:.1f} s", flush=True
    )
    nodes = [
        {"host": host, "checks": [dataclasses.asdict(check) for check in found]} for host, found in verdict.items()
    ]
    with contextlib.suppress(OSError):  # a full disk is what this may be about
        write_json(paths.preflight(attempt), {"attempt": attempt, "seconds": round(seconds, 1), "nodes": nodes})
    bad = [
        {"host": host, "checks": [dataclasses.asdict(check) for check in found if not check.ok]}
        for host, found in verdict.items()
        if any(not check.ok and check.fault == "node" for check in found)
    ]
    of_the_run = {check.name for check in all_checks if not check.ok and check.fault == "run"}
    if of_the_run:
        return ExitCode.BAD_INPUT if "packages" in of_the_run else ExitCode.IO_ERROR
    if not bad:
        return ExitCode.OK
    append_event(paths, "preflight_failed", attempt=attempt, nodes=bad)
    return ExitCode.BAD_NODE
