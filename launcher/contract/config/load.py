"""One YAML file plus `key=value` overrides → a checked RunSpec, and where each of its values came from.

Layers, later ones win: schema defaults, the cluster file, the user's file, overrides. `${...}` interpolation is done
on the merged layers, then every value is converted by OmegaConf's structured schema, one by one, so that every
problem is reported at once with the line it was written on.

Rejected: OmegaConf.load with one merge (it stops at the first problem and knows no lines), and Hydra (it owns the
command line and the working directory).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from launcher.contract import resources
from launcher.contract.arrival import here, here_path
from launcher.contract.config import checks
from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.leaves import (
    ANY_NAME,
    NAMED_SECTIONS,
    Leaf,
    Leaves,
    Source,
    describe,
    leaf_types,
    read_overrides,
    read_yaml,
    type_of,
)
from launcher.contract.rundir import RUN_NAME
from launcher.contract.secret_names import is_secret_name
from launcher.contract.spec import ClusterSpec, ResourcesSpec, RunSpec, RuntimeSpec, SourceSpec

_LARGEST_FILE = 10_000_000
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([^}\s,'\"]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A checked spec with its history."""

    spec: RunSpec
    path: Path
    sources: Mapping[str, Source]
    """Dotted key → the layer its value came from, in schema order."""
    described: Mapping[str, Any] | None = None
    """config.json of the model that a NeMo config spells out; the one in model.path must be like it."""
    auto_topology: bool = False
    """`topology: auto`: the layout is still to be chosen."""

    def changed(self) -> Iterator[tuple[str, Any, Source]]:
        """Key, value and source of everything that is not a schema default."""
        default = RunSpec()
        unset = {name: SourceSpec() for name in self.spec.data.sources}
        default = dataclasses.replace(default, data=dataclasses.replace(default.data, sources=unset))
        for key, source in self.sources.items():
            value = value_at(self.spec, key)
            if source != "default" and value != value_at(default, key):
                yield key, value, source


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFile(ClusterSpec):
    """What a file in cluster_configs/ may hold: a cluster, and defaults for what is asked of it."""

    resources: ResourcesSpec = field(default_factory=ResourcesSpec)


def value_at(spec: RunSpec, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(_below, key.split("."), spec)


def _below(node: Any, name: str) -> Any:
    return node[name] if isinstance(node, Mapping) else getattr(node, name)


def _keys(spec: RunSpec) -> Iterator[str]:
    """Dotted key of every value of `spec`."""
    for key, _ in leaf_types(RunSpec):
        parent, placeholder, rest = key.partition(f".{ANY_NAME}.")
        yield from (f"{parent}.{name}.{rest}" for name in value_at(spec, parent)) if placeholder else (key,)


def load_cluster(name: str) -> ClusterFile:
    """The cluster file NAME, checked for its keys and types; ConfigError names every line that is wrong."""
    leaves = _read_cluster(Leaf(name, "cluster", f"cluster {name}"))
    flat = {key.removeprefix("cluster."): leaf for key, leaf in leaves.values.items()}
    if leaves.problems:
        raise ConfigError(leaves.problems)
    problems = []
    schema = OmegaConf.structured(ClusterFile)
    for key, leaf in flat.items():
        try:
            OmegaConf.merge(schema, _nested({key: leaf}))
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            problems.append(f"{leaf.where}: {key}: {reason}")
    if problems:
        raise ConfigError(problems)
    found = cast(ClusterFile, OmegaConf.to_object(OmegaConf.merge(schema, _nested(flat))))
    problems = [f"{flat['host'].where}: {key}: {problem}" for key, problem in _host_problems(found)]
    if problems:
        raise ConfigError(problems)
    return found


def load_config(
    path: Path, overrides: Sequence[str] = (), cluster: str | None = None, *, resolved: bool = False
) -> LoadedConfig:
    """Read and check a config; raises ConfigError with every problem.

    `resolved` says that the file is a run's own config.yaml, in which `${` is text.
    """
    merged = _merged(path, overrides, cluster, resolved)
    auto = _auto_topology(merged)
    spec = checked(merged, str(path))
    sources: dict[str, Source] = {
        key: merged.values[key].source if key in merged.values else "default" for key in _keys(spec)
    }
    return LoadedConfig(spec=spec, path=path, sources=sources, described=merged.described, auto_topology=auto)


def checked(merged: Leaves, shown: str) -> RunSpec:
    """The leaves as a RunSpec with absolute paths; ConfigError with every problem. `shown` is what they come from."""
    spec = _absolute(_at_its_host(typed(merged)))
    for key, message in (*checks.spec_problems(spec), *checks.file_problems(spec)):
        if key not in merged.bad:
            merged.problems.append(f"{_where(merged, key, shown)}: {key}: {message}")
    if merged.problems:
        raise ConfigError(merged.problems)
    return spec


def read_remote(path: Path, overrides: Sequence[str] = (), cluster: str | None = None) -> RunSpec | None:
    """The config as written, if its cluster is behind ssh; paths in it are the host's, and so nothing is checked.

    ConfigError with every key and value that would be wrong anywhere.
    """
    merged = _merged(path, overrides, cluster, False)
    host = merged.values.get("cluster.host")
    if host is None or host.value is None:
        return None
    _auto_topology(merged)
    spec = typed(merged)
    where = {name: _where(merged, f"cluster.{name}", str(path)) for name in ("host", "host_directory")}
    merged.problems += [f"{where[name]}: cluster.{name}: {problem}" for name, problem in _host_problems(spec.cluster)]
    if merged.problems:
        raise ConfigError(merged.problems)
    return spec


_HOST = re.compile(r"[A-Za-z0-9_.@:%\[\]][A-Za-z0-9_.@:%\[\]-]*")


def _host_problems(cluster: ClusterSpec) -> Iterator[tuple[str, str]]:
    """What is wrong with the way to the host."""
    if cluster.host is not None and not _HOST.fullmatch(cluster.host):
        yield "host", f"{cluster.host!r} is not a host name, or user@host"
    if cluster.host is not None and not cluster.host_directory:
        yield "host_directory", f"missing; the directory on {cluster.host} in which commands run and runs/ is"


def _at_its_host(spec: RunSpec) -> RunSpec:
    """Whoever checks a config is where its cluster is: the way there is no part of the run."""
    return dataclasses.replace(spec, cluster=dataclasses.replace(spec.cluster, **_NO_HOST))


_NO_HOST: dict[str, Any] = {
    item.name: item.default if item.default is not dataclasses.MISSING else []
    for item in dataclasses.fields(ClusterSpec)
    if item.name.startswith("host")
}


def _where(merged: Leaves, key: str, shown: str) -> str:
    """Where `key` was written; for one that is missing in a section that the user named, where that begins."""
    section = f"{key.rpartition('.')[0]}."
    beside = [name for name in merged.values if name.startswith(section)] if section.count(".") > 2 else []
    written = [key, *beside] if key in merged.values else beside
    return merged.values[written[0]].where if written else shown


def _merged(path: Path, overrides: Sequence[str], cluster: str | None, resolved: bool) -> Leaves:
    """The layers laid over each other."""
    written = _read_file(path, ("lock" if resolved else "sweep",))
    if resolved:
        written.values = {
            key: dataclasses.replace(leaf, value=_literal(leaf.value)) for key, leaf in written.values.items()
        }
    on_top = read_overrides(overrides, RunSpec)
    named = _named_cluster(written, on_top, cluster)
    beneath = _read_cluster(named) if named is not None else Leaves()
    merged = Leaves(
        values={**beneath.values, **written.values},
        problems=[*beneath.problems, *written.problems, *on_top.problems],
        bad=beneath.bad | written.bad | on_top.bad,
        described=written.described,
    )
    for key, leaf in on_top.values.items():
        if key.endswith("."):  # entries for a mapping, beside those it has
            before = merged.values.get(key[:-1])
            leaf = dataclasses.replace(leaf, value={**(before.value if before else {}), **leaf.value})
        merged.values[key.rstrip(".")] = leaf
        merged.bad.discard(key.rstrip("."))
    return merged


_AUTO_CHOOSES = tuple(f"topology.{name}" for name in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline"))


def _auto_topology(merged: Leaves) -> bool:
    """Whether the layout is to be chosen; later layers win: sizes by override over the word in the file, and back."""
    word = merged.values.pop("topology", None)
    if word is None:
        return False
    if word.value != "auto":
        merged.problems.append(f"{word.where}: topology: {word.value!r} is not the word auto; give that, or its keys")
        return False
    sizes = [key for key in _AUTO_CHOOSES if key in merged.values]
    if word.source == "override":
        for key in sizes:
            del merged.values[key]
        return True
    return not sizes


def _read_file(path: Path, others: Sequence[str]) -> Leaves:
    """The leaves of the user's file, which may be a NeMo config; `others` are sections that are not a run's."""
    text = read_text(path)
    if "trainer" in text:
        from launcher.contract.nemo.convert import read_leaves
        from launcher.contract.nemo.document import is_nemo

        if is_nemo(text):
            return read_leaves(text, str(path))
    return read_yaml(text, str(path), RunSpec, "file", named=NAMED_SECTIONS, others=others)


def read_text(path: Path) -> str:
    """The text of a config file; ConfigError where it cannot be read."""
    try:
        at = here_path(path)
        if at.exists() and not at.is_file():
            raise ConfigError(f"{path} is not a file")
        if at.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path} has {at.stat().st_size:,} bytes, and a config at most {_LARGEST_FILE:,}")
        return at.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [item.name for item in path.parent.glob("*.y*ml")])
        raise ConfigError(f"{path}: no such file{near}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _named_cluster(written: Leaves, on_top: Leaves, option: str | None) -> Leaf | None:
    """The name of the cluster, if one is named; by --cluster or override it displaces settings in the file."""
    by_file, by_override = written.values.pop("cluster", None), on_top.values.pop("cluster", None)
    named = Leaf(option, "override", f"--cluster {option}") if option else by_override or by_file
    if named is not None and named is not by_file:
        for key in [key for key in written.values if key.startswith("cluster.")]:
            del written.values[key]
    return named


def _read_cluster(named: Leaf) -> Leaves:
    """Leaves of the named cluster's file, keyed as in a RunSpec."""
    if not isinstance(named.value, str) or not RUN_NAME.fullmatch(named.value):
        return Leaves(problems=[f"{named.where}: cluster: {named.value!r} is not the name of a cluster file"])
    path = resources.find("cluster_configs", named.value, ".yaml")
    flat = read_yaml(read_text(path), str(path), ClusterFile, "cluster")
    leaves = Leaves(problems=flat.problems)
    for key, leaf in flat.values.items():
        leaves.values[key if key.startswith("resources.") else f"cluster.{key}"] = leaf
    name = leaves.values.setdefault("cluster.name", Leaf(named.value, "cluster", str(path)))
    if name.value != named.value:
        leaves.problems.append(f"{name.where}: name: {name.value!r} is not the file's name {named.value!r}")
    return leaves


def typed(merged: Leaves) -> RunSpec:
    """The leaves as a RunSpec; what does not fit its type is reported and left at its default."""
    schema = OmegaConf.structured(RunSpec)
    for key in list(merged.values):
        problem = _forbidden(merged.values[key].value)
        if problem is not None:
            _reject(merged, key, problem)
    try:  # all at once, which is quick
        return _built(schema, _interpolated(schema, merged.values))
    except OmegaConfBaseException:
        return _built(schema, _fitting(schema, _untyped(schema, merged.values), merged))


def _interpolated(schema: Any, leaves: Mapping[str, Leaf]) -> Mapping[str, Leaf]:
    """The leaves with their interpolations done; most configs have none, and need no second tree for it."""
    if not any("${" in text for leaf in leaves.values() for text in _texts(leaf.value)):
        return leaves
    raw = _untyped(schema, leaves)
    return {key: dataclasses.replace(leaf, value=_resolved(raw, key)) for key, leaf in leaves.items()}


def _untyped(schema: Any, leaves: Mapping[str, Leaf]) -> Any:
    """Defaults and leaves in one tree that refuses no type: what interpolations are looked up in."""
    return OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(schema)), _nested(leaves))


def _built(schema: Any, leaves: Mapping[str, Leaf]) -> RunSpec:
    return cast(RunSpec, OmegaConf.to_object(OmegaConf.merge(schema, _nested(leaves))))


def _fitting(schema: Any, raw: Any, merged: Leaves) -> dict[str, Leaf]:
    """The leaves that resolve and fit their type; each of the others is reported."""
    fitting = {}
    for key, leaf in list(merged.values.items()):
        try:
            typed = dataclasses.replace(leaf, value=_resolved(raw, key))
            OmegaConf.merge(schema, _nested({key: typed}))
            fitting[key] = typed
        except ValidationError:
            _reject(merged, key, _not_a(leaf.value, type_of(RunSpec, key)))
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            _reject(merged, key, f"{leaf.value!r} does not resolve: {reason}")
    return fitting


def _reject(merged: Leaves, key: str, problem: str) -> None:
    leaf = merged.values.pop(key)
    merged.bad.add(key)
    merged.problems.append(f"{leaf.where}: {key}: {problem}")


def _forbidden(value: Any) -> str | None:
    """Why OmegaConf must not see this value, if it must not."""
    for text in _texts(value):
        if text == "???":
            return "'???' stands for a missing value; set it"
        if "${" not in text:
            continue
        try:
            OmegaConf.create({"value": text})
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            return f"{text!r} is not a valid ${{...}} interpolation: {reason}"
        for name in _ENVIRONMENT.findall(text):
            if "$" in name or is_secret_name(name):
                return f"{name} looks like a secret, and the resolved config is stored; name it in env_from instead"
    return None


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    return [item for item in items if isinstance(item, str)]


def _literal(value: Any) -> Any:
    """The value with every `${` escaped: it is what it is, and not to be interpolated (again)."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    return value


def _resolved(raw: Any, key: str) -> Any:
    """The value of `key` with its interpolations done; a `${` that is left is text."""
    value = OmegaConf.select(raw, key, throw_on_missing=True)
    return _literal(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)


def _not_a(value: Any, kind: Any) -> str:
    shown = "null" if value is None else repr(value)
    choices = [str(choice) for choice in get_args(kind) if get_origin(kind) is Literal]
    return f"{shown} is not {describe(kind)}{did_you_mean(str(value), choices)}"


def _nested(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    tree: dict[str, Any] = {}
    for key, leaf in leaves.items():
        *sections, name = key.split(".")
        functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[name] = leaf.value
    return tree


def _absolute(spec: RunSpec) -> RunSpec:
    """Relative paths made absolute against the working directory, and globs replaced by what they match."""
    model, data, checkpoint, runtime = spec.model, spec.data, spec.checkpoint, spec.cluster.runtime
    package = model.path.startswith("package:")
    return dataclasses.replace(
        spec,
        run_root=_path(spec.run_root),
        after=_path(spec.after) if spec.after and "/" in spec.after else spec.after,
        model=dataclasses.replace(
            model,
            path=model.path if package or not model.path else _path(model.path),
            tokenizer=_path(model.tokenizer) if model.tokenizer else None,
        ),
        data=dataclasses.replace(
            data,
            train=_files(data.train),
            sources={
                name: dataclasses.replace(source, files=_files(source.files)) for name, source in data.sources.items()
            },
            validation=_files(data.validation),
            validation_sets={name: _path(pattern) for name, pattern in data.validation_sets.items()},
            chat_template=data.chat_template
            if data.chat_template in ("tokenizer", "none")
            else _path(here(data.chat_template)),
            cache_dir=_path(data.cache_dir) if data.cache_dir else None,
        ),
        evaluation=dataclasses.replace(
            spec.evaluation, prompts=_path(here(spec.evaluation.prompts)) if spec.evaluation.prompts else None
        ),
        checkpoint=dataclasses.replace(
            checkpoint, resume_from=_path(checkpoint.resume_from) if checkpoint.resume_from else None
        ),
        cluster=dataclasses.replace(
            spec.cluster,
            runtime=_absolute_runtime(runtime),
            secrets_dir=_path(spec.cluster.secrets_dir) if spec.cluster.secrets_dir else None,
        ),
    )


def _absolute_runtime(runtime: RuntimeSpec) -> RuntimeSpec:
    """A conda environment may be a name and an image a registry reference: those stay as they are."""
    path, image = runtime.path, runtime.image
    if path and (runtime.kind == "venv" or "/" in path):
        path = _path(path)
    if image and Path(image).expanduser().exists():
        image = _path(image)
    return dataclasses.replace(runtime, path=path, image=image)


def _path(text: str) -> str:
    return os.path.normpath(Path(text).expanduser().absolute())


def _files(patterns: Sequence[str]) -> list[str]:
    """Absolute files in the order given; a glob's matches sorted; a pattern without matches stays, to be reported."""
    files: list[str] = []
    for pattern in map(_path, patterns):
        matches = [] if Path(pattern).exists() else sorted(map(str, Path("/").glob(pattern.removeprefix("/"))))
        files += matches or [pattern]
    return files
