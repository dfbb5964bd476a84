"""SmolLM3: Llama with layers that do not rotate, by default every fourth, and tied embeddings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    ACTIVATIONS,
    SMALL,
    biases_of,
    llama_layer,
    rope_of,
    sliding_layers,
    weight_map,
    windows_of,
)


def _read(config: ConfigReader) -> Architecture:
    shape = replace(config.shape, tied_embeddings=config.flag("tie_word_embeddings", default=True))
    config.require("num_key_value_heads")
    activation = config.choice("hidden_act", ACTIVATIONS)
    biases = biases_of(config)
    mlp = DenseMLP(width=shape.ffn_hidden_size, activation=activation, bias=biases.mlp)
    rotating = _rotating_layers(config)
    layers = [
        DecoderLayer(
            attention=Attention(rotary=rotary, window=window, qkv_bias=biases.attention, output_bias=biases.attention),
            mlp=mlp,
        )
        for rotary, window in zip(rotating, _windows(config, rotating), strict=True)
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map(shape, partial(llama_layer, biases=biases)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config, default_theta=2000000.0),
    )


def _rotating_layers(config: ConfigReader) -> list[bool]:
    """Return which layers rotate. The key is named for the others, and yet 1 means a layer that does."""
    stated = config.list_by_layer("no_rope_layers")
    if stated is not None:
        return [bool(value) for value in stated]
    interval = config.number("no_rope_layer_interval", 4)
    if interval < 1:
        config.refuse(f"no_rope_layer_interval {interval:g} is below 1")
        interval = 1
    return [(layer + 1) % interval != 0 for layer in range(config.shape.num_layers)]


def _windows(config: ConfigReader, rotating: list[bool]) -> list[int | None]:
    """Return each layer's window: by `layer_types`, or else, where switched on, in the layers that do not rotate."""
    sliding = sliding_layers(config)
    if sliding is not None:
        return windows_of(config, sliding)
    slides = config.flag("use_sliding_window", default=False) and config.values.get("sliding_window") is not None
    return windows_of(config, [slides and not rotary for rotary in rotating])


FAMILY = Family(
    model_type="smollm3",
    read=_read,
    small_config={
        **SMALL,
        "no_rope_layers": [1, 0, 1, 1],
        "tie_word_embeddings": True,
        # transformers' defaults are tokens beyond a small vocabulary
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    variants={
        "by_interval": {
            "use_sliding_window": True,
            "sliding_window": 20,
            "no_rope_layers": None,
            "no_rope_layer_interval": 2,
            "tie_word_embeddings": False,
        },
        # All rotate: without a rotation the bias on keys shifts all scores of a query alike, and has no gradient.
        "biased": {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 1, 1, 1]},
    },
)
