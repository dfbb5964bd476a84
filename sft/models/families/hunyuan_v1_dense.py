"""HunYuan (dense, 0.5B to 7B): Llama with norms on query and key heads after their rotation, and a stretched theta."""

from __future__ import annotations

from functools import partial

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, SMALL, Biases, Layer, llama_layer, rope_of, weight_map
from sft.models.rope import Rope, rope_settings
from sft.models.weight_map import vector


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("head_dim")
    config.flag("use_qk_norm", default=True)  # published configs state it; transformers has the norms whatever it says
    config.refuse_true("mlp_bias", "use_cla")
    if shape.num_experts:
        config.refuse(f"num_experts {shape.num_experts} is not supported: transformers builds none for this model type")
    biased = config.flag("attention_bias", default=False)
    layer = DecoderLayer(
        attention=Attention(qk_norm=True, norm_rotated=True, qkv_bias=biased, output_bias=biased),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=config.choice("hidden_act", ACTIVATIONS)),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, partial(_layer, biased=biased)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=_rope(config),
    )


def _rope(config: ConfigReader) -> Rope | None:
    """Return the RoPE settings. `dynamic` with an alpha is plain RoPE of a larger theta, whatever a row's length."""
    settings = rope_settings(config.values)
    alpha, theta, size = settings.get("alpha"), settings["rope_theta"], config.shape.head_dim
    if settings["rope_type"] != "dynamic" or not alpha:
        return rope_of(config, understood=("alpha",))
    if not isinstance(alpha, int | float) or alpha <= 0 or size <= 2:
        config.refuse(f"the RoPE setting alpha {alpha} with head_dim {size}: they must be above 0 and above 2")
    elif isinstance(theta, int | float):
        settings["rope_theta"] = theta * alpha ** (size / (size - 2))
    return rope_of(config, understood=("alpha",), values={"rope_parameters": {**settings, "rope_type": "default"}})


def _layer(shape: ModelShape, prefix: str, *, biased: bool) -> Layer:
    return llama_layer(shape, prefix, Biases(attention=biased)) | {
        f"self_attention.{ours}_layernorm.weight": vector(
            f"{prefix}self_attn.{theirs}_layernorm.weight", shape.head_dim
        )
        for ours, theirs in (("q", "query"), ("k", "key"))
    }


FAMILY = Family(
    model_type="hunyuan_v1_dense",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
    },
    variants={
        "plain_rope": {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
)
