"""Linear layers have the biases that the architecture says, which Megatron-core's configuration cannot say.

It has one switch for linear_proj, linear_fc1 and linear_fc2, which also gives linear_qkv a bias. Where any of them has
one, all are built with it, and those that the model does not have are taken off before weights are loaded.
"""

from __future__ import annotations

from sft.megatron.core import GPTModel
from sft.models.architecture import Architecture, Attention, DecoderLayer, Experts


def drop_absent_biases(model_chunk: GPTModel, architecture: Architecture) -> None:
    """Take the biases off the linear layers of a chunk that have none in the model."""
    for layer in model_chunk.decoder.layers:
        for name, biased in _biased(architecture.layers[layer.layer_number - 1]).items():
            if not biased:
                layer.get_submodule(name).register_parameter("bias", None)


def _biased(layer: DecoderLayer) -> dict[str, bool]:
    """Return by name which linear layers of a layer have a bias. Experts build their products themselves."""
    attention = {}
    # Linear and latent attention build their products themselves.
    if isinstance(layer.attention, Attention) and layer.attention.latent is None:
        attention = {
            "self_attention.linear_qkv": layer.attention.qkv_bias,
            "self_attention.linear_proj": layer.attention.output_bias,
        }
    if isinstance(layer.mlp, Experts):
        return attention
    return attention | {"mlp.linear_fc1": layer.mlp.bias, "mlp.linear_fc2": layer.mlp.bias}
