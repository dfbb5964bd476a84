"""The language model inside a multimodal checkpoint: where its tensors are, and what else the files hold.

Its names are found in the files, not derived from a version of transformers: earlier ones wrote
`language_model.model.layers...`, later ones write `model.language_model.layers...`. Without files (a plan, random
weights) they are today's. Everything outside of the language model is carried along: the vision tower, the projector,
heads that predict further tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.contract.errors import ModelError
from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.stored_tensors import has_weights, weight_map
from sft.models.weight_map import LANGUAGE_MODULE

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"
_ROWS_COMPARED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModel:
    """Where the language model of a checkpoint is."""

    prefix: str = LANGUAGE_MODULE
    """What the names of its tensors begin with."""
    head: str = _HEAD
    """The name of its output layer."""
    tied: bool
    stored: Collection[str] = ()
    """All tensors of the checkpoint."""


def find_language_model(model_dir: Path, *, ties: bool) -> LanguageModel:
    """Return where the language model is in the files of `model_dir`.

    `ties` says that the config ties the embeddings. As in transformers, a head that is stored all the same and differs
    is one of its own. Raise ModelError where no language model, or more than one, is found.
    """
    if not has_weights(model_dir):
        return LanguageModel(tied=ties)
    files = weight_map(model_dir)
    embeddings = [name for name in files if name.endswith(_EMBEDDING) and "language_model" in name]
    if len(embeddings) != 1:
        raise ModelError(
            f"{model_dir}: {len(embeddings)} tensors are named *language_model*{_EMBEDDING}; one is needed"
        )
    heads = [name for name in files if name == _HEAD or name.endswith(f".{_HEAD}")]
    if len(heads) > 1:
        raise ModelError(f"{model_dir}: more than one output layer: {', '.join(heads)}")
    head = heads[0] if heads else _HEAD
    tied = ties and (not heads or _begin_alike(model_dir, files, head, embeddings[0]))
    return LanguageModel(prefix=embeddings[0].removesuffix(_EMBEDDING), head=head, tied=tied, stored=tuple(files))


def read_language_model(config: ConfigReader, *families: Family) -> Architecture:
    """Return the architecture of the language model, whose config this is, by the one of `families` that it is of."""
    found = {family.model_type: family for family in families}
    kind = config.shape.model_type
    if kind not in found:
        raise ModelError(
            f"text_config.model_type {kind!r} is not supported inside this model; only {' or '.join(map(repr, found))}"
        )
    return found[kind].read(config)


def inside(architecture: Architecture, place: LanguageModel) -> Architecture:
    """Return the architecture with the names that its tensors have in the checkpoint."""

    def rename(name: str) -> str:
        return place.head if name == _HEAD else place.prefix + name.removeprefix("model.")

    weights = architecture.weights.renamed(rename)
    own = {*weights.hf_shapes(), place.head}
    others = sorted(name for name in place.stored if name not in own and not name.startswith(place.prefix))
    carried = (*(rename(name) for name in weights.carried if name.startswith("model.")), *others)
    return replace(
        architecture,
        weights=replace(weights, head=place.head, language_prefix=place.prefix, carried=carried),
    )


def with_nested_names(architecture: Architecture, model_dir: Path) -> Architecture:
    """Return the architecture of a language model by itself with the names that its files have.

    They may be those of the multimodal model that it comes from: transformers writes such files, too. Its modules have
    the names of the language model all the same.
    """
    nested = has_weights(model_dir) and any(name.startswith(LANGUAGE_MODULE) for name in weight_map(model_dir))
    if not nested:
        return architecture
    found = inside(architecture, find_language_model(model_dir, ties=architecture.shape.tied_embeddings))
    return replace(found, weights=replace(found.weights, module_prefix="model."))


def _begin_alike(model_dir: Path, files: Mapping[str, str], *names: str) -> bool:
    """Return whether the first rows of two tensors are the same. That all rows are is checked before training."""
    import torch
    from safetensors import safe_open

    rows = []
    for name in names:
        with safe_open(model_dir / files[name], framework="pt") as file:
            rows.append(file.get_slice(name)[:_ROWS_COMPARED])
    return torch.equal(*rows)
