"""The sizes of LoRA's adapters, from those of the model and the names of the adapted layers.

What a family calls its linear layers is known to `sft.models`; here are the names as far as they decide sizes, so that
plans and MFU need no architecture. A test compares both for every family.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import LoraSpec

_FUSED = ("phi3",)
"""Model types whose files have Q, K and V in one matrix, and gate and up projection in another."""
_JOINED_EXPERTS = ("gpt_oss", "qwen3_5_moe_text")
"""Model types whose published files have the matrices of all experts in one tensor, gate and up projection in one."""
_JOINED = ("qwen3_next",)
"""Model types whose files have the projection of linear attention in two matrices, others in four."""
_NUMBERED_EXPERTS = ("mixtral",)
"""Model types that call the matrices of an expert w1, w3 and w2."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear layer of the files."""

    name: str
    inputs: int
    outputs: int

    def parameters(self, lora: LoraSpec) -> int:
        """Return the trained weights of its adapter: A, B and, with DoRA, a length for each row."""
        assert lora.rank is not None
        if lora.names and self.name not in lora.names:
            return 0
        return lora.rank * (self.inputs + self.outputs) + (self.outputs if lora.dora else 0)


def layer_adapters(shape: ModelShape, lora: LoraSpec, *, dense: bool = False, linear: bool = False) -> int:
    """Return what is trained of a decoder layer outside its experts. `dense` is for one that has none in such a model.

    `linear` is for a layer with linear attention.
    That is adapters of attention and of the MLP or shared expert, and the router where it is trained.
    """
    routed = bool(shape.num_experts) and not dense
    width = shape.shared_expert_size if routed else shape.ffn_hidden_size
    linears = (_linear_attention(shape) if linear else _attention(shape)) + (_mlp(shape, width) if width else [])
    router = shape.num_experts * shape.hidden_size if routed and lora.router else 0
    return sum(linear.parameters(lora) for linear in linears) + router


def expert_adapters(shape: ModelShape, lora: LoraSpec) -> int:
    """Return what is trained of one expert."""
    hidden, width = shape.hidden_size, shape.expert_ffn_hidden_size
    down = width, hidden
    if shape.model_type in _JOINED_EXPERTS:
        sides = {"experts.gate_up_proj": (hidden, 2 * width), "experts.down_proj": down}
    elif shape.model_type in _NUMBERED_EXPERTS:
        sides = {"w1": (hidden, width), "w3": (hidden, width), "w2": down}
    else:
        sides = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": down}
    plain = LoraSpec(rank=lora.rank, targets=lora.targets)
    return sum(_Linear(name, *side).parameters(plain) for name, side in sides.items())


def active_adapters(shape: ModelShape, lora: LoraSpec) -> int:
    """Return what is trained of all layers and works for one token: of experts those that it goes to."""
    dense, linear = len(shape.dense_layers), len(shape.linear_layers)
    more = linear * (layer_adapters(shape, lora, linear=True) - layer_adapters(shape, lora)) if linear else 0
    usual = layer_adapters(shape, lora) + shape.experts_per_token * expert_adapters(shape, lora)
    return (shape.num_layers - dense) * usual + dense * layer_adapters(shape, lora, dense=True) + more


def _attention(shape: ModelShape) -> list[_Linear]:
    hidden = shape.hidden_size
    queries, groups = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    output = _Linear("o_proj", queries, hidden)
    if shape.model_type in _FUSED:
        return [_Linear("qkv_proj", hidden, queries + 2 * groups), output]
    return [
        _Linear("q_proj", hidden, 2 * queries if shape.output_gate else queries),
        _Linear("k_proj", hidden, groups),
        _Linear("v_proj", hidden, groups),
        output,
    ]


def _linear_attention(shape: ModelShape) -> list[_Linear]:
    hidden, sizes = shape.hidden_size, shape.linear
    assert sizes is not None
    output = _Linear("out_proj", sizes.values, hidden)
    if shape.model_type in _JOINED:
        heads = 2 * sizes.value_heads
        return [
            _Linear("in_proj_qkvz", hidden, sizes.projected - heads),
            _Linear("in_proj_ba", hidden, heads),
            output,
        ]
    return [
        _Linear("in_proj_qkv", hidden, sizes.convolved),
        _Linear("in_proj_z", hidden, sizes.values),
        _Linear("in_proj_b", hidden, sizes.value_heads),
        _Linear("in_proj_a", hidden, sizes.value_heads),
        output,
    ]


def _mlp(shape: ModelShape, width: int) -> list[_Linear]:
    hidden = shape.hidden_size
    down = _Linear("down_proj", width, hidden)
    if shape.model_type in _FUSED:
        return [_Linear("gate_up_proj", hidden, 2 * width), down]
    return [_Linear("gate_proj", hidden, width), _Linear("up_proj", hidden, width), down]
