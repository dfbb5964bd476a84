"""One YAML file plus `key=value` overrides -> a checked RunSpec, and where each of its values came from.

Rejected: OmegaConf.load with one merge (it stops at the first problem and knows no lines), and Hydra (it owns the
command line and the working directory).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.config.checks import file_problems, spec_problems
from launcher.contract.config.cluster_file import host_problems
from launcher.contract.config.conversion import typed_spec
from launcher.contract.config.layers import merged_layers, take_auto_topology
from launcher.contract.errors import ConfigError
from launcher.contract.hub.found import Fetch
from launcher.contract.hub.resolve import Resolution, resolve_hub
from launcher.contract.leaves import Leaves, Source
from launcher.contract.spec import ClusterSpec, RunSpec, SourceSpec
from launcher.contract.spec.fields import ANY_NAME, leaf_types, with_absolute_paths


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A checked spec with its history."""

    spec: RunSpec
    path: Path
    sources: Mapping[str, Source]
    """Dotted key -> the layer its value came from, in schema order."""
    given_resources: tuple[str, ...] | None
    """Keys of `resources` that the user wrote; None for a run's config that was made without a record of it."""
    described: Mapping[str, object] | None = None
    """config.json of the model that a NeMo config spells out; the one in model.path must be like it."""
    auto_topology: bool = False
    """`topology: auto`: the topology is still to be chosen."""
    notes: tuple[str, ...] = ()
    """What became of hub ids."""
    fetches: tuple[Fetch, ...] = ()
    """Files of the hub that the run needs and the cache lacks."""

    def changed(self) -> Iterator[tuple[str, object, Source]]:
        """Yield key, value and source of everything that is not a schema default."""
        default = RunSpec()
        unset = {name: SourceSpec() for name in self.spec.data.sources}
        default = dataclasses.replace(default, data=dataclasses.replace(default.data, sources=unset))
        for key, source in self.sources.items():
            value = value_at(self.spec, key)
            if source != "default" and value != value_at(default, key):
                yield key, value, source


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    cluster: str | None = None,
    *,
    resolved: bool = False,
    given: Collection[str] | None = None,
) -> LoadedConfig:
    """Read and check a config, or raise ConfigError with every problem.

    `resolved` says that the file is a run's own config.yaml, in which `${` is text. `given` are the keys of its
    `resources` that its user wrote, None where that was not recorded.
    """
    merged = merged_layers(path, overrides, cluster, resolved, given)
    auto = take_auto_topology(merged)
    found = _checked(merged, str(path))
    spec = found.spec
    sources: dict[str, Source] = {
        key: merged.values[key].source if key in merged.values else "default" for key in _keys(spec)
    }
    return LoadedConfig(
        spec=spec,
        path=path,
        sources=sources,
        given_resources=_given_resources(sources) if given is not None or not resolved else None,
        described=merged.described,
        auto_topology=auto,
        notes=found.notes,
        fetches=found.fetches,
    )


def checked_spec(merged: Leaves, shown: str) -> RunSpec:
    """Return the leaves as a RunSpec with absolute paths, or raise ConfigError with every problem.

    `shown` is where the leaves come from, for problems of keys that nobody wrote.
    """
    found = _checked(merged, shown)
    if found.fetches:
        raise ConfigError(
            [
                f"{it.snapshot} is not in the cache; fetch it first: `hf download {it.snapshot.repository.id}`"
                for it in found.fetches
            ]
        )
    return found.spec


def _checked(merged: Leaves, shown: str) -> Resolution:
    """Return the checked spec, and what became of the hub ids in it."""
    written = typed_spec(merged)
    found = resolve_hub(_at_its_host(written))
    spec = _dated(with_absolute_paths(found.spec))
    for key, message in found.problems:
        merged.problems.append(f"{merged.where(key, shown)}: {key}: {message}")
    merged.bad |= {key for key, _ in found.problems}
    of_host = ((f"cluster.{key}", problem) for key, problem in host_problems(written.cluster))
    for key, message in (*of_host, *spec_problems(spec), *file_problems(spec)):
        if key not in merged.bad:
            merged.problems.append(f"{merged.where(key, shown)}: {key}: {message}")
    if merged.problems:
        raise ConfigError(merged.problems)
    return dataclasses.replace(found, spec=spec)


def _dated(spec: RunSpec) -> RunSpec:
    """Return the spec with the day that it is submitted: a run that goes on tomorrow has one date all the same."""
    if spec.data.date is not None:
        return spec
    return dataclasses.replace(spec, data=dataclasses.replace(spec.data, date=datetime.date.today().isoformat()))


def read_remote(path: Path, overrides: Sequence[str] = (), cluster: str | None = None) -> RunSpec | None:
    """Return the config as written if its cluster is behind ssh, else None.

    Paths in it are the host's, so only keys and types are checked; raise ConfigError with each that is wrong.
    """
    merged = merged_layers(path, overrides, cluster, resolved=False)
    host = merged.values.get("cluster.host")
    if host is None or host.value is None:
        return None
    take_auto_topology(merged)
    spec = typed_spec(merged)
    for key, problem in host_problems(spec.cluster):
        merged.problems.append(f"{merged.where(f'cluster.{key}', str(path))}: cluster.{key}: {problem}")
    if merged.problems:
        raise ConfigError(merged.problems)
    return spec


def _given_resources(sources: Mapping[str, Source]) -> tuple[str, ...]:
    section = "resources."
    written = (key for key, source in sources.items() if source not in ("default", "cluster"))
    return tuple(key.removeprefix(section) for key in written if key.startswith(section))


def value_at(spec: RunSpec, key: str) -> object:
    """Return the value of a dotted key."""
    node: object = spec
    return functools.reduce(_below, key.split("."), node)


def _below(node: object, name: str) -> object:
    return node[name] if isinstance(node, Mapping) else getattr(node, name)


def _keys(spec: RunSpec) -> Iterator[str]:
    """Yield the dotted key of every value of `spec`."""
    for key, _ in leaf_types(RunSpec):
        parent, placeholder, rest = key.partition(f".{ANY_NAME}.")
        names = value_at(spec, parent) if placeholder else None
        yield from (f"{parent}.{name}.{rest}" for name in names) if isinstance(names, Mapping) else (key,)


def _at_its_host(spec: RunSpec) -> RunSpec:
    """Return the run without the way to its cluster's host: whoever checks a config is there already."""
    default = ClusterSpec()
    names = [item.name for item in dataclasses.fields(ClusterSpec) if item.name.startswith("host")]
    cluster = dataclasses.replace(spec.cluster, **{name: getattr(default, name) for name in names})
    return dataclasses.replace(spec, cluster=cluster)
