"""Read a model's sizes from its Hugging Face `config.json`, with json alone: the launcher imports no transformers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from launcher.contract.errors import ModelError, did_you_mean
from launcher.contract.expert_sizes import read_dense_layers, read_expert_sizes
from launcher.contract.head_sizes import HeadSizes, read_wide_heads
from launcher.contract.latent_attention import LatentAttention, read_latent_attention
from launcher.contract.linear_attention import LinearAttention, read_linear_layers
from launcher.contract.model_types import facts_of
from launcher.contract.resources import packaged
from launcher.contract.usual_keys import HfConfig, language_model_config, with_usual_keys
from launcher.contract.windows import read_windows

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which PEFT and transformers know an adapter."""
_NAMED = "model_shapes.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder-only transformer's sizes."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """KV heads."""
    head_dim: int
    """Size of a head of queries or keys."""
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    gated_mlp: bool = True
    """Whether the MLP has a gate beside its up projection."""
    num_experts: int = 0
    """Experts of each layer; 0 for a dense model."""
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    """Width of one expert."""
    shared_expert_size: int = 0
    """Width of the MLP that every token meets beside its experts; 0 for none."""
    weighted_shared_expert: bool = False
    """Whether each token weights the output of that MLP."""
    experts_beside_mlp: bool = False
    """Whether that MLP is a layer's dense one, with norms of its own as the experts have, and the router scales tokens
    and the weights of experts by trained numbers."""
    joined_experts: bool = False
    """Whether the files have the matrices of all experts in one tensor, gate and up projection in one matrix."""
    dense_layers: tuple[int, ...] = ()
    """Of a mixture of experts the layers, counted from 0, that have a dense MLP all the same."""
    layer_norms: int = 2
    """Norms of the hidden size in each layer."""
    norms_first: bool = True
    """Whether norms are before attention and MLP, or only behind them."""
    qk_norm: bool = False
    """Whether each layer norms heads of queries and keys, with a weight of head_dim for each."""
    width_norm: bool = False
    """Whether each layer norms all query heads together, and all key heads, with a weight of all their sizes."""
    output_gate: bool = False
    """Whether attention has a gate for each of its outputs, which the projection of queries also makes."""
    latent: LatentAttention | None = None
    """The latent attention that all layers have."""
    linear: LinearAttention | None = None
    """The linear attention that some layers have."""
    linear_layers: tuple[int, ...] = ()
    """Those layers, counted from 0."""
    window: int | None = None
    """Positions that a token sees in layers with a sliding window, itself included."""
    windowed_layers: tuple[int, ...] = ()
    """Layers that have the window, counted from 0."""
    wide_heads: HeadSizes | None = None
    """The heads of layers without the window, where they have sizes of their own."""
    keyed_values: bool = False
    """Whether values are the projected keys, so that there is no projection of values. Of all layers; for those with
    `wide_heads` that says it."""
    learned_positions: int = 0
    """Positions that have a trained vector each."""

    @property
    def rotary_dim(self) -> int:
        """The part of a head of queries or keys that rotary positions know of."""
        return self.head_dim if self.latent is None else self.latent.rotary_dim

    @property
    def value_dim(self) -> int:
        """The size of a head of values."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def core_dim(self) -> int:
        """The size of all heads where scores and contexts are computed."""
        return self.head_dim if self.latent is None else self.latent.core_dim

    @property
    def active_ffn_size(self) -> int:
        """The feed-forward width that one token meets in a layer: of its experts and the shared one, together."""
        if not self.num_experts:
            return self.ffn_hidden_size
        return self.experts_per_token * self.expert_ffn_hidden_size + self.shared_expert_size

    def for_layers(self, *, windowed: bool) -> ModelShape:
        """Return the shape with the heads of layers that have the window, or of those that do not."""
        heads = self.wide_heads
        if heads is None:
            return self
        if windowed:
            return replace(self, wide_heads=None)
        return replace(
            self,
            wide_heads=None,
            head_dim=heads.head_dim,
            num_query_groups=heads.query_groups,
            keyed_values=heads.keyed_values,
        )

    @property
    def head_kinds(self) -> tuple[ModelShape, ...]:
        """The shape with each kind of heads that its layers have."""
        if self.wide_heads is None:
            return (self,)
        windowed = len(self.windowed_layers)
        kinds = {True: windowed > 0, False: windowed < self.num_layers}
        return tuple(self.for_layers(windowed=kind) for kind, exists in kinds.items() if exists)

    @property
    def largest_head(self) -> int:
        """The size of the largest heads of any layer."""
        return max(kind.core_dim for kind in self.head_kinds)

    @classmethod
    def from_config(cls, config: HfConfig, where: str) -> ModelShape:
        """Read the keys that Llama-like configs share, or GPT-2's. A multimodal config has those of its language model.

        `where` names the file in errors.
        """
        config = language_model_config(config)
        model_type = str(config.get("model_type", ""))
        facts = facts_of(model_type)
        config = with_usual_keys(config, model_type)
        needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        missing = [key for key in needed if not isinstance(config.get(key), int)]
        if missing:
            raise ModelError(f"{where}: no integer {', '.join(missing)}; is this a decoder-only model's config?")
        for key in needed:
            if config[key] < 1:
                raise ModelError(f"{where}: {key} {config[key]} is not above 0")
        experts = read_expert_sizes(config)
        if experts and not 1 <= experts["experts_per_token"] <= experts["num_experts"]:
            count, chosen = experts["num_experts"], experts["experts_per_token"]
            raise ModelError(f"{where}: num_experts_per_tok {chosen} is not from 1 to the number of experts, {count}")
        heads: int = config["num_attention_heads"]
        layers: int = config["num_hidden_layers"]
        window, windowed = read_windows(config, layers, facts.window)
        latent = read_latent_attention(config, model_type, where) if facts.attention == "latent" else None
        hybrid = read_linear_layers(config, layers, where) if facts.attention == "hybrid" else {}
        wide = read_wide_heads(config, windowed, where) if facts.attention == "wide_heads" else None
        # Experts beside an MLP have norms of their own: one before them, and one behind either.
        beside = bool(experts) and facts.experts_beside_mlp
        return cls(
            model_type=model_type,
            num_layers=layers,
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=latent.query_dim if latent else config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings") or 2**31,
            tied_embeddings=bool(config.get("tie_word_embeddings", facts.tied)),
            gated_mlp=facts.gated_mlp,
            layer_norms={"before": 2, "behind": 2, "around": 7 if beside else 4}[facts.norms],
            norms_first=facts.norms != "behind",
            qk_norm=facts.normed_heads or (bool(config.get("use_qk_norm")) and not facts.normed_width),
            width_norm=facts.normed_width,
            latent=latent,
            **hybrid,
            window=window,
            windowed_layers=windowed,
            wide_heads=wide,
            **experts,
            weighted_shared_expert="shared_expert_intermediate_size" in config and not beside,
            experts_beside_mlp=beside,
            dense_layers=read_dense_layers(config, facts.dense_by) if experts else (),
            joined_experts=bool(experts) and facts.joined_experts,
            learned_positions=config.get("max_position_embeddings") or 0 if facts.learned_positions else 0,
        )


def read_model_shape(model_dir: Path) -> ModelShape:
    """Return the sizes of the model in `model_dir`, or raise ModelError."""
    path, adapter = model_dir / "config.json", model_dir / ADAPTER_CONFIG
    if adapter.is_file():  # beside a model too, transformers loads the model that the adapter names, and adds it
        raise ModelError(
            f"model.path: {model_dir} holds an adapter ({adapter.name}), which is not read; to train from it, merge it "
            "into its model (PEFT's merge_and_unload) and name the result, else remove the file"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.path: no config.json in {model_dir}; it must be a Hugging Face model directory"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"model.path: {path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"model.path: {path} holds a {type(config).__name__}, not an object")
    shape = ModelShape.from_config(config, str(path))
    if shape.joined_experts and _names_separate_experts(model_dir):
        return replace(shape, joined_experts=False)
    return shape


def _names_separate_experts(model_dir: Path) -> bool:
    """Return whether the files, by their index or the header of the only one, have each expert by itself.

    transformers writes some models so that are published with all experts in one tensor. The head that predicts further
    tokens (mtp) has experts in a form of its own.
    """
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    names = b""
    if single.is_file():
        with single.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            names = file.read(min(length, single.stat().st_size))  # a damaged file may state any length
    elif index.is_file():
        names = index.read_bytes()
    return re.search(rb'"(?!mtp\.)[^"]*\.experts\.0\.down_proj\.weight"', names) is not None


def named_model_config(name: str) -> HfConfig:
    """Return the config.json of a model listed in model_shapes.yaml, for planning and benchmarks."""
    values = yaml.safe_load(packaged(_NAMED))
    if name not in values:
        raise ModelError(f"{name!r} is not a known model size{did_you_mean(name, values)}; known: {', '.join(values)}")
    config: HfConfig = values[name]
    return config


def named_model_shape(name: str) -> ModelShape:
    """Return the sizes of a model listed in model_shapes.yaml."""
    return ModelShape.from_config(named_model_config(name), f"{_NAMED}: {name}")
