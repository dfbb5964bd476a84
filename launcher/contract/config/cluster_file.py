"""Cluster files: one YAML file of cluster_configs/ a machine or site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf.errors import OmegaConfBaseException, ValidationError

from launcher.contract import resources
from launcher.contract.config.conversion import build, not_a, schema_of
from launcher.contract.config.overrides import type_of
from launcher.contract.config.text import read_text
from launcher.contract.config.yaml_leaves import read_yaml
from launcher.contract.errors import ConfigError, TemplateError
from launcher.contract.leaves import Leaf, Leaves
from launcher.contract.rundir import RUN_NAME
from launcher.contract.spec import ClusterSpec, ResourcesSpec
from launcher.contract.spec.fields import Problem, rule_problems


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFile(ClusterSpec):
    """What a cluster file may hold: a cluster, and defaults for what is asked of it."""

    resources: ResourcesSpec = field(default_factory=ResourcesSpec)


def load_cluster(name: str) -> ClusterFile:
    """Return the cluster file `name`, its keys and types checked.

    Raise ConfigError with every line that is wrong.
    """
    named = Leaf(name, "cluster", f"cluster {name}")
    leaves = _leaves(named)
    if leaves.problems:
        raise ConfigError(leaves.problems)
    written = {key.removeprefix("cluster."): leaf for key, leaf in leaves.values.items()}
    schema = schema_of(ClusterFile)
    problems = []
    for key, leaf in written.items():
        try:
            build(ClusterFile, schema, {key: leaf})
        except ValidationError:
            problems.append(f"{leaf.where}: {key}: {not_a(leaf.value, type_of(ClusterFile, key))}")
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            problems.append(f"{leaf.where}: {key}: {reason}")
    if problems:
        raise ConfigError(problems)
    cluster = build(ClusterFile, schema, written)
    problems = [
        f"{written.get(key, written.get('host', named)).where}: {key}: {problem}"
        for key, problem in host_problems(cluster)
    ]
    ledger = (problem for key, problem in rule_problems(cluster) if key == "node_ledger")
    problems += [f"{written['node_ledger'].where}: node_ledger: {problem}" for problem in ledger]
    if problems:
        raise ConfigError(problems)
    return cluster


def read_cluster(named: Leaf) -> Leaves:
    """Return the leaves of the named cluster's file, keyed as in a RunSpec.

    Raise TemplateError, with the place where it was named, where there is no such file: what the rest of the config
    means depends on it.
    """
    try:
        return _leaves(named)
    except TemplateError as error:
        raise TemplateError(f"{named.where}: {error}") from None


def _leaves(named: Leaf) -> Leaves:
    if not isinstance(named.value, str) or not RUN_NAME.fullmatch(named.value):
        return Leaves(problems=[f"{named.where}: cluster: {named.value!r} is not the name of a cluster file"])
    path = resources.find("cluster_configs", named.value, ".yaml")
    flat = read_yaml(read_text(path), str(path), ClusterFile, "cluster")
    leaves = Leaves(problems=flat.problems)
    for key, leaf in flat.values.items():
        leaves.values[key if key.startswith("resources.") else f"cluster.{key}"] = leaf
    if "scheduler" not in flat.values and not flat.problems:  # a job of Slurm would else run on the login node
        leaves.problems.append(f"{path}: scheduler: missing; slurm, or local for processes of this machine")
    name = leaves.values.setdefault("cluster.name", Leaf(named.value, "cluster", str(path)))
    if name.value != named.value:
        leaves.problems.append(f"{name.where}: name: {name.value!r} is not the file's name {named.value!r}")
    return leaves


def host_problems(cluster: ClusterSpec) -> Iterator[Problem]:
    """Yield what is wrong with the way to the cluster's host, with keys as in a cluster file."""
    yield from (problem for problem in rule_problems(cluster) if problem[0] == "host")
    if cluster.host is not None and not cluster.host_directory:
        yield "host_directory", f"missing; the directory on {cluster.host} in which commands run and runs/ is"
    unset = ClusterSpec()
    for name in ("host_directory", "host_python", "host_options"):
        if cluster.host is None and getattr(cluster, name) != getattr(unset, name):
            yield name, "needs host: without it commands run on this machine"
