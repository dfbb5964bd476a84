"""Combine what the nodes have reported into one list of checks for each host."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.contract.rundir import JsonObject
from sft.health.preflight import checks
from sft.health.preflight.checks import Check
from sft.health.preflight.pairs import Pair, blame

Results = dict[str, list[Check]]
"""Host -> its checks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one node reports."""

    node: int
    host: str
    checks: list[Check]
    versions: dict[str, str]
    pairs: dict[int, str | None] = field(default_factory=dict)
    """Partner of an all-reduce -> what went wrong, or None."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Report:
        """Return the report that `dataclasses.asdict` and JSON have made these values of."""
        pairs = {int(partner): problem for partner, problem in values["pairs"].items()}
        return cls(**{**values, "checks": [Check(**check) for check in values["checks"]], "pairs": pairs})


def combine(reports: Sequence[Report], hosts: Sequence[str]) -> Results:
    """Return the checks of every host, those included that compare the reports of all nodes.

    A node without a report fails. What fails on more than half of several nodes is the run's fault: no other node would
    do better.
    """
    results: Results = {}
    reference = checks.most_common([report.versions for report in reports])
    by_node = {report.node: report for report in reports}
    silent = [node for node in range(len(hosts)) if node not in by_node]
    blamed = blame(_pairs(reports), silent)
    for node, host in enumerate(hosts):
        if node in silent:
            results[host] = [Check(name="answer", ok=False, detail="no report in time")]
            continue
        report = by_node[node]
        results[host] = [*report.checks, checks.check_versions(report.versions, reference)]
        if report.pairs:
            results[host].append(_pair_check(report, blamed.get(node, []), hosts))
    return _shared_faults(results)


def _pairs(reports: Sequence[Report]) -> dict[Pair, bool]:
    """Return for every pair whether the all-reduce worked, which takes both nodes to say so."""
    worked: dict[Pair, bool] = {}
    for report in reports:
        for partner, problem in report.pairs.items():
            pair = (min(report.node, partner), max(report.node, partner))
            worked[pair] = worked.get(pair, True) and problem is None
    return worked


def _pair_check(report: Report, failed: Sequence[int], hosts: Sequence[str]) -> Check:
    if not failed:
        met = ", ".join(hosts[partner] for partner, problem in report.pairs.items() if problem is None)
        return Check(name="all-reduce", ok=True, detail=f"with {met or 'no partner that could answer'}")
    why = next((problem for partner in failed if (problem := report.pairs.get(partner))), "the partner gave up")
    return Check(name="all-reduce", ok=False, detail=f"failed with {', '.join(hosts[n] for n in failed)}: {why}")


def _shared_faults(results: Mapping[str, list[Check]]) -> Results:
    """Return the checks, with the run at fault where most nodes cannot write its directory, or have its packages."""
    failing = Counter(check.name for found in results.values() for check in found if not check.ok)
    shared = [name for name in checks.SHARED_FAULTS if 2 * failing[name] > len(results)]
    return {
        host: [dataclasses.replace(check, fault="run") if check.name in shared else check for check in found]
        for host, found in results.items()
    }


def table(results: Mapping[str, Sequence[Check]]) -> str:
    """Return one line for each host, and one more for each of its checks that failed."""
    width = max(map(len, results))
    lines = []
    for host, found in results.items():
        bad = [check for check in found if not check.ok]
        names = ", ".join(check.name for check in found)
        lines.append(f"preflight  {host:<{width}}  {'FAILED' if bad else f'ok  ({names})'}")
        lines += [f"preflight  {'':<{width}}    {check.name}: {check.detail}" for check in bad]
    return "\n".join(lines)
