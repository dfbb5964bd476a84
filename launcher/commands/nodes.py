"""nodes: which nodes jobs keep away from, and why."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING

from launcher.commands.arguments import Subcommands, command, json_option, print_json, run_root_option
from launcher.commands.completion import CLUSTER, completed
from launcher.contract.errors import ConfigError, RunStateError, SchedulerError
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.contract.spec import ClusterSpec
    from launcher.runs.excluded_nodes import NodeEvidence


def add(commands: Subcommands) -> None:
    """Declare the command."""
    parser = command(commands, "nodes", _nodes, "nodes that jobs keep away from: the evidence, add to it, clear it")
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "add", "clear"),
        default="list",
        help="list (the default): show all evidence; add: exclude a node by hand; clear: forget a node's evidence",
    )
    parser.add_argument("host", nargs="?", help="the node to add or to clear")
    cluster = parser.add_argument(
        "--cluster", metavar="NAME", help="default: all clusters with a ledger of the user's own"
    )
    completed(cluster, CLUSTER)
    parser.add_argument("--why", help="add: what is wrong with the node")
    run_root_option(parser)
    json_option(parser)


def _nodes(options: argparse.Namespace) -> int:
    if options.action == "list":
        return _list(options)
    if not options.host or not options.cluster or (options.action == "add" and not options.why):
        why = " --why TEXT" if options.action == "add" else ""
        raise ConfigError(f"nodes {options.action} needs a node and its cluster: HOST --cluster NAME{why}")
    from launcher.contract.config.cluster_file import load_cluster
    from launcher.runs.excluded_nodes import by_hand, hosts_to_exclude, ledger_of

    cluster = load_cluster(options.cluster)
    ledger = ledger_of(cluster)
    if options.action == "add":
        _check_use(cluster)
        hosts = _existing(options.host, cluster)
        _check_number(hosts, cluster)
        before = set(hosts_to_exclude(cluster))
        ledger.add([by_hand(host, options.why, cluster.node_days) for host in hosts])
        print(f"kept away from for {cluster.node_days:g} days: {', '.join(hosts)}")
        displaced = sorted(before - set(hosts_to_exclude(cluster)))
        if displaced:
            print(f"used again, as max_excluded of {cluster.name} is {cluster.max_excluded}: {', '.join(displaced)}")
        return int(ExitCode.OK)
    known = {entry.host for entry in ledger.entries()}
    hosts = [options.host] if options.host in known else _hosts(options.host, cluster)
    if not known & set(hosts):
        raise RunStateError(f"{ledger.path} has nothing on {options.host}")
    for host in hosts:
        ledger.clear(host)
    print(f"may be used again: {', '.join(hosts)}")
    return int(ExitCode.OK)


def _check_use(cluster: ClusterSpec) -> None:
    """Raise ConfigError where jobs of the cluster keep away from no node, whatever is known of it."""
    from launcher.contract.schedulers import CAPABILITIES

    because = {
        "it is this machine alone, without nodes to choose from": not CAPABILITIES[cluster.scheduler].allocates_nodes,
        "its max_excluded is 0": not cluster.max_excluded,
        "its node_days is 0": not cluster.node_days,
    }
    for why in (why for why, is_so in because.items() if is_so):
        raise ConfigError(f"nodes add has no effect on cluster {cluster.name}: {why}")


def _check_number(hosts: Sequence[str], cluster: ClusterSpec) -> None:
    """Raise ConfigError where not even these hosts can all be excluded."""
    if len(hosts) > cluster.max_excluded:
        raise ConfigError(
            f"{len(hosts)} nodes, and jobs of cluster {cluster.name} keep away from at most {cluster.max_excluded}; "
            "raise max_excluded in its file, or name them in resources.exclude"
        )


def _hosts(words: str, cluster: ClusterSpec) -> list[str]:
    """Return the hosts in a host list, or the words as they are where no scheduler is here that could tell."""
    from launcher.scheduler.factory import scheduler_of

    with contextlib.suppress(SchedulerError):
        return scheduler_of(cluster.scheduler).host_names(words)
    return [words]


def _existing(words: str, cluster: ClusterSpec) -> list[str]:
    """Return the hosts in a host list, or raise ConfigError for one that the cluster has no node of."""
    from launcher.scheduler.factory import scheduler_of

    hosts = _hosts(words, cluster)
    try:
        unknown = scheduler_of(cluster.scheduler).unknown_nodes(hosts)
    except SchedulerError as error:
        print(f"whether the cluster has such a node is not checked: {error}", file=sys.stderr)
        return hosts
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: no node of cluster {cluster.name}; `sinfo -N` shows their names")
    return hosts


def _list(options: argparse.Namespace) -> int:
    from launcher.contract.rundir import default_run_root
    from launcher.runs.excluded_nodes import describe, learn, ledger_of
    from launcher.runs.find import all_runs

    rows: list[NodeEvidence] = []
    for cluster in _clusters(options.cluster):
        if options.cluster:  # whose runs the others are is not known
            learn(all_runs(options.run_root or default_run_root()), cluster)
        entries = ledger_of(cluster).entries()
        rows += describe(cluster.name, entries, cluster.max_excluded)
    if options.json:
        print_json(rows)
        return int(ExitCode.OK)
    from launcher.views.text import columns

    head = ("CLUSTER", "NODE", "EXCLUDED", "UNTIL", "EVIDENCE", "WHY")
    body = [
        (row.cluster, row.host, "yes" if row.excluded else "no", _day(row.expires), row.kind, row.why) for row in rows
    ]
    print(columns([head, *body]) if body else "no evidence against any node")
    return int(ExitCode.OK)


def _clusters(name: str | None) -> list[ClusterSpec]:
    from launcher.contract.config.cluster_file import load_cluster
    from launcher.contract.spec import ClusterSpec
    from launcher.runs.excluded_nodes import ledger_of

    if name:
        return [load_cluster(name)]
    folder = ledger_of(ClusterSpec(name="any")).path.parent
    return [ClusterSpec(name=path.stem) for path in sorted(folder.glob("*.json"))]


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
