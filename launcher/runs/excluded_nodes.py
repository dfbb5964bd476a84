"""Nodes that new submissions keep away from: a ledger for each cluster, of evidence that expires.

Nodes that one run avoids when it is restarted, because an error or a log of its own named them, are another matter
(launcher.attempts.cause).

An entry is added where a run's own events name a node: it failed the preflight, or the first rank to hang was on it.
The node list of a failed job is not evidence. A single hang excludes no node, since a program can hang on any: two
attempts must have hung on the same host. At most `cluster.max_excluded` nodes are excluded at a time.

The launcher writes the ledger when it submits and for `launcher nodes`; compute nodes may not see the user's home.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.contract.errors import ConfigError, LauncherError
from launcher.contract.records import read_events
from launcher.contract.rundir import RunPaths, read_json, write_json
from launcher.contract.spec import ClusterSpec, read_resolved

Kind = Literal["preflight", "hang", "by hand"]

_NEEDED = {"hang": 2}
"""How many entries of a kind exclude a node; one of any other kind does."""
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What an event whose fields are not those that were written leads to."""
_DAY = 24 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One piece of evidence against a node."""

    host: str
    kind: Kind
    why: str
    time: float
    expires: float
    run: str = ""
    attempt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeEvidence:
    """A row of `launcher nodes`: one piece of evidence against a node, and whether jobs keep away from it."""

    cluster: str
    """The cluster's name."""
    host: str
    """The node."""
    kind: Kind
    """What found it bad."""
    why: str
    """What was found, or what a person wrote."""
    time: float
    """When, in seconds since the epoch."""
    expires: float
    """Until when it counts, in seconds since the epoch."""
    run: str
    """Directory of the run that met the node; empty for evidence given by hand."""
    attempt: str
    """The attempt that met it."""
    excluded: bool
    """Whether new jobs keep away from the node."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The entries of a cluster, in one JSON file."""

    path: Path

    def entries(self) -> list[Entry]:
        """Return the entries that have not expired, oldest first."""
        try:
            values = read_json(self.path) or []
            entries = [Entry(**value) for value in values]
        except (ValueError, TypeError) as error:
            raise LauncherError(f"{self.path} is not a ledger of nodes ({error}); move it away") from None
        return sorted((entry for entry in entries if entry.expires > time.time()), key=lambda entry: entry.time)

    def add(self, new: Iterable[Entry]) -> None:
        """Add entries. The same evidence from the same attempt counts once."""

        def change(entries: list[Entry]) -> list[Entry]:
            return list({(e.host, e.kind, e.run, e.attempt): e for e in [*new, *entries]}.values())

        self._change(change)

    def clear(self, host: str) -> int:
        """Remove all entries of a node and return how many there were."""
        gone = [entry for entry in self.entries() if entry.host == host]
        self._change(lambda entries: [entry for entry in entries if entry.host != host])
        return len(gone)

    def _change(self, change: Callable[[list[Entry]], list[Entry]]) -> None:
        with _locked(self.path):
            write_json(self.path, [dataclasses.asdict(entry) for entry in change(self.entries())])


def ledger_of(cluster: ClusterSpec) -> Ledger:
    """Return the cluster's ledger: the configured file, or one in the user's state directory."""
    if cluster.node_ledger:
        return Ledger(Path(cluster.node_ledger).expanduser())
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Ledger(Path(state).expanduser() / "slurm-sft-launcher" / "nodes" / f"{cluster.name}.json")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def excluded(entries: Sequence[Entry], most: int) -> list[str]:
    """Return the hosts with enough evidence. Of more than `most` those with the newest evidence are excluded."""
    newest: dict[str, float] = {}
    for entry in entries:
        same = [other for other in entries if (other.host, other.kind) == (entry.host, entry.kind)]
        if len(same) >= _NEEDED.get(entry.kind, 1):
            newest[entry.host] = max(newest.get(entry.host, 0.0), entry.time)
    return sorted(sorted(newest, key=lambda host: -newest[host])[:most])


def hosts_to_exclude(cluster: ClusterSpec) -> list[str]:
    """Return the hosts that the cluster's ledger has enough evidence against."""
    return excluded(ledger_of(cluster).entries(), cluster.max_excluded)


def exclude_option(cluster: ClusterSpec, given: str | None, unknown: Collection[str] = ()) -> str | None:
    """Return the nodes to exclude as a host list, the config's own first, or None where there are none.

    Hosts in `unknown` are left out: Slurm refuses a job for a name that is no node of it.
    Slurm accepts host lists joined by commas, brackets included.
    """
    hosts = [host for host in hosts_to_exclude(cluster) if host not in unknown]
    return ",".join([*([given] if given else []), *hosts]) or None


def learn(runs: Iterable[RunPaths], cluster: ClusterSpec) -> None:
    """Add what the events of these runs say about nodes of the cluster, unless it has expired."""
    since = time.time() - cluster.node_days * _DAY
    new: list[Entry] = []
    for paths in runs:
        with contextlib.suppress(
            OSError, ConfigError, *_DAMAGE
        ):  # a directory that is being removed, or of another version
            telling = list(_telling(paths)) if paths.events.stat().st_mtime > since else []
            if telling and read_resolved(paths.config).cluster.name == cluster.name:
                new += [entry for event in telling for entry in _evidence(event, paths, cluster.node_days)]
    ledger = ledger_of(cluster)
    if new and not {_key(entry) for entry in new} <= {_key(entry) for entry in ledger.entries()}:
        ledger.add(new)


def by_hand(host: str, why: str, days: float) -> Entry:
    """Return an entry that a person makes."""
    now = time.time()
    return Entry(host=host, kind="by hand", why=why, time=now, expires=now + days * _DAY)


def _key(entry: Entry) -> tuple[str, str, str, str]:
    return entry.host, entry.kind, entry.run, entry.attempt


def _telling(paths: RunPaths) -> Iterator[dict[str, Any]]:
    return (event for event in read_events(paths) if event.get("event") in ("hang_detected", "preflight_failed"))


def _evidence(event: dict[str, Any], paths: RunPaths, days: float) -> Iterator[Entry]:
    """Yield the entries for an event. A hang on several hosts at once says nothing about one of them."""
    common: dict[str, Any] = {
        "run": str(paths.root),
        "attempt": str(event.get("attempt", "")),
        "time": float(event["time"]),
        "expires": float(event["time"]) + days * _DAY,
    }
    if event["event"] == "preflight_failed":
        for node in event.get("nodes", []):
            why = "; ".join(f"{check['name']}: {check['detail']}" for check in node["checks"])
            yield Entry(host=node["host"], kind="preflight", why=why, **common)
        return
    behind = event.get("behind", [])
    if event.get("told_apart") and len({place["host"] for place in behind}) == 1:
        ranks = ", ".join(str(place["rank"]) for place in behind)
        yield Entry(host=behind[0]["host"], kind="hang", why=f"rank {ranks} hung after step {event['step']}", **common)


def describe(cluster: str, entries: Sequence[Entry], most: int) -> list[NodeEvidence]:
    """Return the rows of `launcher nodes`."""
    out = excluded(entries, most)
    return [NodeEvidence(cluster=cluster, **dataclasses.asdict(entry), excluded=entry.host in out) for entry in entries]
