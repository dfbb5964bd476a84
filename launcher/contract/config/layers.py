"""The layers of a config laid over each other; later ones win: cluster file, the user's file, overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from launcher.contract.config.cluster_file import read_cluster
from launcher.contract.config.conversion import literal
from launcher.contract.config.overrides import read_overrides
from launcher.contract.config.text import read_text
from launcher.contract.config.yaml_leaves import read_yaml
from launcher.contract.errors import ConfigError
from launcher.contract.leaves import NAMED_SECTIONS, Leaf, Leaves
from launcher.contract.spec import ResourcesSpec, RunSpec
from launcher.contract.yaml_document import check_keys

_AUTO_CHOOSES = tuple(
    f"topology.{name}" for name in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "layers_per_stage")
)
"""Keys of which none may be set where the topology is to be chosen."""
_AUTO_KEEPS = tuple(
    f"topology.{name}"
    for name in ("sequence_parallel", "expert_parallel", "expert_tensor_parallel", "context_parallel")
)
"""Keys that may be: the choice keeps them."""
_PER_NODE = ("gpus_per_node", "tasks_per_node")
_SIZES = ("nodes", "spare_nodes", *_PER_NODE)
"""Resources that say how many ranks there are."""


def merged_layers(
    path: Path,
    overrides: Sequence[str],
    cluster: str | None,
    resolved: bool,
    given: Collection[str] | None = None,
) -> Leaves:
    """Return the leaves of all layers.

    `cluster` is the word of --cluster; `resolved` says that the file is a run's own config.yaml, in which `${` is text.
    `given` are the keys of its `resources` that its user wrote, None where that was not recorded.
    """
    written = _read_file(path, resolved)
    if resolved:
        written.values = {
            key: dataclasses.replace(leaf, value=literal(leaf.value)) for key, leaf in written.values.items()
        }
    on_top = read_overrides(overrides, RunSpec)
    named = _named_cluster(written, on_top, cluster)
    beneath = read_cluster(named) if named is not None else Leaves()
    if given is not None:
        _take_back_resources(written, given, beneath if named is not None else None)
    elif resolved:
        _unset_resources(written, beneath)
    merged = Leaves(
        values={**beneath.values, **written.values},
        problems=[*beneath.problems, *written.problems, *on_top.problems],
        bad=beneath.bad | written.bad | on_top.bad,
        described=written.described,
    )
    for key, leaf in on_top.values.items():
        if key.endswith("."):  # entries for a mapping, beside those it has
            key = key[:-1]
            before = merged.values.get(key)
            leaf = dataclasses.replace(leaf, value={**(before.entries if before else {}), **leaf.entries})
        merged.values[key] = leaf
        merged.bad.discard(key)
    return merged


def _take_back_resources(written: Leaves, given: Collection[str], beneath: Leaves | None) -> None:
    """Have the resources that a run's user did not write come from its cluster's file again, and from another's anew.

    `beneath` is the file of the cluster that is named anew, None where none is. The run's layout is made for its
    numbers of nodes and ranks: they stay where that file does not give others.
    """
    for name in (field.name for field in dataclasses.fields(ResourcesSpec) if field.name not in given):
        key = f"resources.{name}"
        leaf = written.values.get(key)
        if leaf is None:
            continue
        sizes = _PER_NODE if name in _PER_NODE else (name,)
        stays = beneath is None or (name in _SIZES and not any(f"resources.{size}" in beneath.values for size in sizes))
        if stays:
            written.values[key] = dataclasses.replace(leaf, source="default" if _is_unset(name, leaf) else "cluster")
        else:
            del written.values[key]


def _unset_resources(written: Leaves, beneath: Leaves) -> None:
    """Take what a run has not set of its resources out of its own config, where another cluster's file gives it.

    A resolved config spells out every key. What is at its default is taken for not set: earlier versions did not
    record it. Sizes are the run's: its layout is made for them.
    """
    for name in (field.name for field in dataclasses.fields(ResourcesSpec) if field.name not in _SIZES):
        key = f"resources.{name}"
        if key in beneath.values and key in written.values and _is_unset(name, written.values[key]):
            del written.values[key]


def _is_unset(name: str, leaf: Leaf) -> bool:
    """Return whether a leaf of a resolved config has the default of this key of `resources`."""
    unset = getattr(ResourcesSpec(), name)
    return leaf.value in (unset, str(unset), str(unset).lower())


def take_auto_topology(merged: Leaves) -> bool:
    """Take the word `auto` out of the leaves, and return whether the topology is to be chosen.

    Later layers win: sizes in an override over the word in the file, the word in an override over the topology in the
    file. Sizes and the word in overrides are a problem.
    """
    word = merged.values.pop("topology", None)
    if word is None:
        return False
    if word.value != "auto":
        merged.problems.append(f"{word.where}: topology: {word.value!r} is not the word auto; give that, or its keys")
        return False
    if word.source == "override":
        for key in (*_AUTO_CHOOSES, *_AUTO_KEEPS):
            if key in merged.values and merged.values[key].source != "override":
                del merged.values[key]
    sizes = [key for key in _AUTO_CHOOSES if key in merged.values]
    if sizes and word.source == "override":
        given = merged.values[sizes[0]].where
        merged.problems.append(f"{given}: {sizes[0]} is what topology=auto chooses; leave one of the two out")
    return not sizes


def _read_file(path: Path, resolved: bool) -> Leaves:
    """Return the leaves of the user's file, which may be a NeMo config."""
    text = read_text(path)
    if not resolved:  # which spells out more keys than its user wrote
        check_keys(text, str(path))
    if "trainer" in text:
        # Most configs are not NeMo's, and do without the time that these imports take.
        from launcher.contract.nemo.convert import read_leaves
        from launcher.contract.nemo.document import is_nemo

        if is_nemo(text):
            return read_leaves(text, str(path))
    leaves = read_yaml(
        text, str(path), RunSpec, "file", named=NAMED_SECTIONS, others=("lock" if resolved else "sweep",)
    )
    if leaves.problems:
        from launcher.contract.trainers.convert import recognised

        trainer = recognised(text)
        if trainer is not None:
            raise ConfigError(
                f"{path} is a config of {trainer.name}; `launcher import {path} --gpus N` prints it in this launcher's "
                "keys"
            )
    return leaves


def _named_cluster(written: Leaves, on_top: Leaves, option: str | None) -> Leaf | None:
    """Return the name of the cluster, if one is named.

    By --cluster or an override it displaces the cluster's settings in the file.
    """
    by_file, by_override = written.values.pop("cluster", None), on_top.values.pop("cluster", None)
    named = Leaf(option, "override", f"--cluster {option}") if option else by_override or by_file
    if named is not None and named is not by_file:
        for key in [key for key in written.values if key.startswith("cluster.")]:
            del written.values[key]
    return named
