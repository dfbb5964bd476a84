"""The linear layers of a decoder layer: their names in Hugging Face files, as far as known here, and their sizes.

The one table that counts of parameters and operations, sizes of LoRA's adapters and predicted speeds are made from.
What a family calls its tensors is known to `sft.models`; a test compares both for every family.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from launcher.contract.latent_attention import LatentAttention
from launcher.contract.model_shape import ModelShape
from launcher.contract.model_types import facts_of

Place = Literal["qkv", "latents", "queries", "keys", "proj", "fc1", "fc2"]
"""Which of the products of a layer: attention's input and output projection, the MLP's first and second.

In latent attention the input projection is three: what makes latents, what makes queries, and what makes keys and
values of theirs. The first one is whole on every tensor parallel rank.
"""

JOINED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
"""What adapters of experts are called that the files hold in one tensor: gate and up projection together, then down."""


class Linear(NamedTuple):
    """A linear layer. A named tuple, since searches make them often."""

    name: str
    place: Place
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """The number of weights in its matrix."""
        return self.inputs * self.outputs


def attention_linears(shape: ModelShape, *, linear: bool = False) -> tuple[Linear, ...]:
    """Return the projections of attention, or of linear attention.

    Of a model whose layers have different heads, the shape is that of the layer (`ModelShape.for_layers`).
    """
    if linear:
        return _linear_attention(shape)
    if shape.latent is not None:
        return _latent_attention(shape, shape.latent)
    hidden = shape.hidden_size
    queries, groups = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    output = Linear("o_proj", "proj", queries, hidden)
    if facts_of(shape.model_type).joined_qkv:
        return (Linear("qkv_proj", "qkv", hidden, queries + 2 * groups), output)
    return (
        Linear("q_proj", "qkv", hidden, 2 * queries if shape.output_gate else queries),
        Linear("k_proj", "qkv", hidden, groups),
        *(() if shape.keyed_values else (Linear("v_proj", "qkv", hidden, groups),)),
        output,
    )


def mlp_linears(shape: ModelShape, width: int) -> tuple[Linear, ...]:
    """Return the linear layers of an MLP of this width: a dense one, or the shared expert."""
    if facts_of(shape.model_type).joined_gate_and_up:
        hidden = shape.hidden_size
        joined = Linear("gate_up_proj", "fc1", hidden, 2 * width)
        return (joined, Linear("down_proj", "fc2", width, hidden))
    return _gated(shape, width, facts_of(shape.model_type).mlp_names)


def layer_linears(shape: ModelShape, *, dense: bool = False, linear: bool = False) -> tuple[Linear, ...]:
    """Return the linear layers of a decoder layer outside its routed experts: attention, and MLP or shared expert.

    `dense` is for a layer that has an MLP in a model with experts, `linear` for one with linear attention. For `shape`
    see `attention_linears`.
    """
    routed = bool(shape.num_experts) and not dense
    width = shape.shared_expert_size if routed else shape.ffn_hidden_size
    return attention_linears(shape, linear=linear) + (mlp_linears(shape, width) if width else ())


def expert_linears(shape: ModelShape) -> tuple[Linear, ...]:
    """Return the linear layers of one routed expert."""
    if shape.joined_experts:
        hidden, width = shape.hidden_size, shape.expert_ffn_hidden_size
        gate_up, down = JOINED_EXPERTS
        return (Linear(gate_up, "fc1", hidden, 2 * width), Linear(down, "fc2", width, hidden))
    return _gated(shape, shape.expert_ffn_hidden_size, facts_of(shape.model_type).expert_names)


def _gated(shape: ModelShape, width: int, names: tuple[str, str, str]) -> tuple[Linear, ...]:
    hidden = shape.hidden_size
    gate, up, down = names
    found = (Linear(up, "fc1", hidden, width), Linear(down, "fc2", width, hidden))
    return (Linear(gate, "fc1", hidden, width), *found) if shape.gated_mlp else found


def _latent_attention(shape: ModelShape, sizes: LatentAttention) -> tuple[Linear, ...]:
    hidden, heads, rank = shape.hidden_size, shape.num_attention_heads, sizes.query_rank
    queries = heads * sizes.query_dim
    of_keys = Linear("kv_a_proj_with_mqa", "latents", hidden, sizes.key_rank + sizes.rotary_dim)
    rest = (
        Linear("kv_b_proj", "keys", sizes.key_rank, heads * (sizes.plain_dim + sizes.value_dim)),
        Linear("o_proj", "proj", heads * sizes.value_dim, hidden),
    )
    if rank is None:
        return (of_keys, Linear("q_proj", "queries", hidden, queries), *rest)
    return (Linear("q_a_proj", "latents", hidden, rank), of_keys, Linear("q_b_proj", "queries", rank, queries), *rest)


def _linear_attention(shape: ModelShape) -> tuple[Linear, ...]:
    hidden, sizes = shape.hidden_size, shape.linear
    assert sizes is not None
    output = Linear("out_proj", "proj", sizes.values, hidden)
    if facts_of(shape.model_type).joined_linear_attention:
        heads = 2 * sizes.value_heads
        return (
            Linear("in_proj_qkvz", "qkv", hidden, sizes.projected - heads),
            Linear("in_proj_ba", "qkv", hidden, heads),
            output,
        )
    return (
        Linear("in_proj_qkv", "qkv", hidden, sizes.convolved),
        Linear("in_proj_z", "qkv", hidden, sizes.values),
        Linear("in_proj_b", "qkv", hidden, sizes.value_heads),
        Linear("in_proj_a", "qkv", hidden, sizes.value_heads),
        output,
    )
