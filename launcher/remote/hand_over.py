"""Decide which commands run on a cluster's login node instead of here, and hand them over.

A command with a config runs where the config's cluster is; a command on runs where --cluster or SFT_CLUSTER says, or
where the run was submitted to from here. All others run on this machine.

The whole command runs on the host, where model, data and Slurm are, in the code that is sent from here: what is checked
is what is submitted. Rejected: the host's own installation with a check of its version (which does not tell apart two
states of a checkout), and rendering here with only sbatch sent (half of the checks look at files of the cluster).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.contract.arrival import arrival

if TYPE_CHECKING:
    from launcher.contract.spec import ClusterSpec, RunSpec
    from launcher.remote.ssh import Host


def hand_over(options: argparse.Namespace, words: Sequence[str]) -> int | None:
    """Run the command on its cluster's host and return its exit code, or None for a command that runs here."""
    if arrival() is not None or not hasattr(options, "cluster"):
        return None
    return _with_config(options, words) if hasattr(options, "config") else _on_runs(options, words)


def _with_config(options: argparse.Namespace, words: Sequence[str]) -> int | None:
    """Hand over a command on a config file."""
    from launcher.contract.config.load import read_remote

    spec = read_remote(options.config, options.overrides, options.cluster)
    if spec is None:
        return None
    from launcher.contract.manifest import describe_source
    from launcher.remote import sent_runs
    from launcher.remote.delivery import Request, read_files, run_on_host

    files = read_files([str(options.config), *sent_paths(spec)])
    source, diff = describe_source()
    request = Request(words=tuple(words), environment=_values(spec.secret_names), files=files, source=source, diff=diff)
    if hasattr(options, "follow") and not (options.dry_run or options.test_only):
        sent_runs.remember(spec.name, spec.cluster.name, spec.secret_names)  # before it runs: a connection can be lost
    return run_on_host(_host(spec.cluster), request, spec)


def sent_paths(spec: RunSpec) -> list[str]:
    """Return the paths in a config whose files go along with a command, as far as they are here."""
    from launcher.contract.spec.fields import path_fields

    return [field.path for field in path_fields(spec) if field.rule.sent]


def _on_runs(options: argparse.Namespace, words: Sequence[str]) -> int | None:
    """Hand over a command on runs, or on a cluster's nodes."""
    from launcher.remote import sent_runs

    known = sent_runs.recall(options)
    resubmits = hasattr(options, "overrides")
    chosen = os.environ.get("SFT_CLUSTER") or (known.cluster if known else None)
    name = chosen or options.cluster if resubmits else options.cluster or chosen
    if not name:
        return None
    from launcher.contract.config.cluster_file import load_cluster

    cluster = load_cluster(name)
    names = [*cluster.env_from, *(known.secrets if known else ())] if resubmits else []
    return run_on(cluster, words, names)


def run_on(cluster: ClusterSpec, words: Sequence[str], secrets: Sequence[str] = ()) -> int | None:
    """Run a command that needs no file on the cluster's host and return its exit code.

    Return None where the cluster has no host, or this is it.
    """
    if cluster.host is None or arrival() is not None:
        return None
    from launcher.contract.manifest import describe_source
    from launcher.contract.spec import RunSpec
    from launcher.remote.delivery import Request, run_on_host

    source, diff = describe_source()
    request = Request(words=tuple(words), environment=_values(secrets), source=source, diff=diff)
    return run_on_host(_host(cluster), request, RunSpec())


def _values(names: Sequence[str]) -> dict[str, str]:
    """Return the values of the variables that are set. The check on the host reports the others."""
    return {name: os.environ[name] for name in names if name in os.environ}


def _host(cluster: ClusterSpec) -> Host:
    from launcher.remote.ssh import Host

    return Host(
        name=cluster.host or "",
        options=tuple(cluster.host_options),
        python=cluster.host_python,
        directory=cluster.host_directory or "",
        cluster=cluster.name,
    )
