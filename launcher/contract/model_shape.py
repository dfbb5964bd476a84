"""Read a model's sizes from its Hugging Face `config.json`, with json alone: the launcher imports no transformers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launcher.contract.errors import ModelError, did_you_mean
from launcher.contract.head_sizes import WIDE_HEADS, HeadSizes, experts_beside_mlp, read_wide_heads
from launcher.contract.latent_attention import LatentAttention, read_latent_attention
from launcher.contract.linear_attention import HYBRID, LinearAttention, read_linear_layers
from launcher.contract.resources import packaged

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which PEFT and transformers know an adapter."""
HfConfig = dict[str, Any]
"""A config.json as it was read. Its values are whatever the file holds: check them where they are used."""

_NAMED = "model_shapes.yaml"

_TIED_BY_DEFAULT = (
    "ernie4_5",
    "ernie4_5_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "smollm3",
    "starcoder2",
    *WIDE_HEADS,
)
"""Model types for which an absent `tie_word_embeddings` means true."""

_LANGUAGE_MODELS: dict[str, HfConfig] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 131072,
    },
    "gemma4_unified": {
        "model_type": "gemma4_unified_text",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 262144,
    },
    "mistral3": {"model_type": "mistral"},
    "qwen3_5": {"model_type": "qwen3_5_text"},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text"},
}
"""Multimodal model types, and what their `text_config` means where it leaves out the language model's type or sizes."""

_JOINED_EXPERTS = ("gemma4_text", "gpt_oss", "qwen3_5_moe_text")
"""Model types whose published files have the matrices of all experts in one tensor."""
_DENSE_BY_KIND = ("glm4_moe_lite",)
"""Model types that say by `mlp_layer_types` alone which layers of a mixture of experts have none."""
_FOUR_NORMS = ("gemma2", "gemma3_text", "glm4", *WIDE_HEADS)
_NORMS_BEHIND = ("exaone4", "olmo2", "olmo3")
_QK_NORM = ("dots1", "exaone4", "gemma3_text", "hunyuan_v1_dense", "qwen3", "qwen3_moe", *HYBRID, *WIDE_HEADS)
_WITHOUT_GATE = ("arcee", "gpt2", "starcoder2")
"""Model types whose MLPs have no gate beside the up projection."""
_WINDOW_IN_ALL = ("ministral3", "mistral", "mixtral", "phi3", "starcoder2")
"""Model types whose `sliding_window`, where there is one, is that of every layer."""
_WINDOW_IN_ALL_OR_NONE = ("qwen3_moe",)
"""Model types whose layers all have it where `use_sliding_window` is true, and none otherwise."""
_WIDTH_NORM = ("minimax_m2", "olmo2", "olmo3", "olmoe")
_WINDOW_IN_ALL_BUT_EACH = {
    "exaone4": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gpt_oss": 2,
    "olmo3": 4,
    **dict.fromkeys(WIDE_HEADS, 6),
}
"""Model types whose layers, if no `layer_types` says otherwise, have a window in all but each second (or so) layer."""
_WINDOWS = {"gemma4_text": 512, "gemma4_unified_text": 1024}
"""Their window where none is stated, if it is another than 4096."""
_LAST_SEES_ALL = WIDE_HEADS
"""Model types whose last layer has no window, whatever `layer_types` says; nor do they read another pattern."""

GPT2_KEYS = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""The names of the sizes in GPT-2's config."""
ERNIE_KEYS = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
"""The names of the numbers of experts in ERNIE's config."""


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
        if model_type == "gpt2":
            named = {ours: config.get(theirs, config.get(ours)) for ours, theirs in GPT2_KEYS.items()}
            config = config | named | {"num_key_value_heads": None, "head_dim": None}  # GPT-2 reads neither
            config["intermediate_size"] = config.get("intermediate_size") or 4 * (config.get("hidden_size") or 0)
        if model_type == "ernie4_5_moe":
            config = config | _of_ernie(config)
        if model_type in WIDE_HEADS:
            config = config | experts_beside_mlp(config)
        if model_type == "qwen3_5_moe_text":  # none of its layers is dense
            config = {"intermediate_size": config.get("moe_intermediate_size"), **config}
        needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        missing = [key for key in needed if not isinstance(config.get(key), int)]
        if missing:
            raise ModelError(f"{where}: no integer {', '.join(missing)}; is this a decoder-only model's config?")
        for key in needed:
            if config[key] < 1:
                raise ModelError(f"{where}: {key} {config[key]} is not above 0")
        experts = _expert_sizes(config)
        if experts and not 1 <= experts["experts_per_token"] <= experts["num_experts"]:
            count, chosen = experts["num_experts"], experts["experts_per_token"]
            raise ModelError(f"{where}: num_experts_per_tok {chosen} is not from 1 to the number of experts, {count}")
        heads: int = config["num_attention_heads"]
        window, windowed = _windows(config, model_type)
        latent = read_latent_attention(config, model_type, where)
        return cls(
            model_type=model_type,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=latent.query_dim if latent else config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings") or 2**31,
            tied_embeddings=bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
            gated_mlp=model_type not in _WITHOUT_GATE,
            # Experts beside an MLP have norms of their own: one before them, and one behind either.
            layer_norms=(7 if experts and model_type in WIDE_HEADS else 4) if model_type in _FOUR_NORMS else 2,
            norms_first=model_type not in _NORMS_BEHIND,
            qk_norm=model_type in _QK_NORM or (bool(config.get("use_qk_norm")) and model_type not in _WIDTH_NORM),
            width_norm=model_type in _WIDTH_NORM,
            latent=latent,
            **read_linear_layers(config, model_type, config["num_hidden_layers"], where),
            window=window,
            windowed_layers=windowed,
            wide_heads=read_wide_heads(config, model_type, windowed, where),
            keyed_values=False,
            **experts,
            weighted_shared_expert="shared_expert_intermediate_size" in config and model_type not in WIDE_HEADS,
            experts_beside_mlp=bool(experts) and model_type in WIDE_HEADS,
            dense_layers=_dense_layers(config),
            joined_experts=bool(experts) and model_type in _JOINED_EXPERTS,
            learned_positions=config.get("max_position_embeddings") or 0 if model_type == "gpt2" else 0,
        )


def language_model_config(config: HfConfig) -> HfConfig:
    """Return the config of the language model: `config` itself, or what a multimodal one has in `text_config`."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    above = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
    return {**_LANGUAGE_MODELS.get(str(config.get("model_type")), {}), **text, **above}


def _of_ernie(config: HfConfig) -> HfConfig:
    """Return what the config of an ERNIE with experts means, by the names that others have."""
    named = {ours: config.get(theirs) for ours, theirs in ERNIE_KEYS.items()}
    shared = config.get("moe_num_shared_experts", 2)
    keys = {"num_hidden_layers": 0, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}
    stated = [config.get(key, default) for key, default in keys.items()]
    layers, start, end, interval = (number if isinstance(number, int) else 0 for number in stated)
    last = layers - 1 if end == -1 else end
    dense = [layer for layer in range(layers) if (layer + 1) % (interval or 1) or not start <= layer <= last]
    return {**named, "n_shared_experts": shared, "mlp_only_layers": dense}


def _windows(config: HfConfig, model_type: str) -> tuple[int | None, tuple[int, ...]]:
    """Return the window and which layers have it. None and () where no layer has one."""
    layers = range(config["num_hidden_layers"])
    interval = _WINDOW_IN_ALL_BUT_EACH.get(model_type)
    window = config.get("sliding_window", _WINDOWS.get(model_type, 4096) if interval else None)
    if not isinstance(window, int):
        return None, ()
    kinds, bound = config.get("layer_types"), config.get("max_window_layers", 28)
    bound = bound if isinstance(bound, int) else 28  # families that read it refuse anything else
    used = bool(config.get("use_sliding_window"))
    if model_type in _WINDOW_IN_ALL:
        found = list(layers)
    elif model_type in _WINDOW_IN_ALL_OR_NONE:
        found = list(layers) if used else []
    elif isinstance(kinds, list):
        found = [layer for layer, kind in zip(layers, kinds, strict=False) if kind == "sliding_attention"]
    elif model_type == "qwen2_moe":
        found = [layer for layer in layers if used and layer < bound and layer % 2 == 0]
    elif interval:
        each = config.get("sliding_window_pattern") if model_type not in _LAST_SEES_ALL else None
        each = each if each and isinstance(each, int) else interval  # families that read it refuse anything else
        found = [layer for layer in layers if (layer + 1) % each]
    else:
        found = [layer for layer in layers if used and layer >= bound]
    if model_type in _LAST_SEES_ALL:
        found = [layer for layer in found if layer != layers[-1]]
    return (window, tuple(found)) if found else (None, ())


def _expert_sizes(config: HfConfig) -> dict[str, int]:
    """Return the sizes of a mixture of experts, or nothing for a dense model."""
    count = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    chosen = config.get("num_experts_per_tok")
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    if not all(isinstance(size, int) for size in (count, chosen, width)):
        return {}
    shared = config.get("shared_expert_intermediate_size") or width * (config.get("n_shared_experts") or 0)
    return {
        "num_experts": count,
        "experts_per_token": chosen,
        "expert_ffn_hidden_size": width,
        "shared_expert_size": shared,
    }


def _dense_layers(config: HfConfig) -> tuple[int, ...]:
    """Return the layers of a mixture of experts that have none, by any of the keys that say so."""
    if not _expert_sizes(config):
        return ()
    if config.get("model_type") in _DENSE_BY_KIND:
        kinds = config.get("mlp_layer_types")
        kinds = kinds if isinstance(kinds, list) else ["dense"] + ["sparse"] * (config["num_hidden_layers"] - 1)
        return tuple(layer for layer, kind in enumerate(kinds[: config["num_hidden_layers"]]) if kind != "sparse")
    first = config.get("first_k_dense_replace")
    first = first if isinstance(first, int) else 0
    step = config.get("decoder_sparse_step")
    step = step if isinstance(step, int) and step > 0 else 1
    named = config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return tuple(layer for layer in layers if layer < first or layer in named or (layer + 1) % step)


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
