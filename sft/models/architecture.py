"""A decoder-only transformer as values: what Megatron-core must build, layer by layer, and where its weights come from.

A family (`sft.models.families`) reads a `config.json` into these values. Nothing after that asks which family it was:
a bias, a norm or a multiplier that several families share is built in one place.

Rejected: a type tag (`architecture.is_gpt2`) that the code which builds, loads and exports models branches on. Each new
family then touches all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.contract.head_sizes import HeadSizes
from launcher.contract.latent_attention import LatentAttention
from launcher.contract.linear_attention import LinearAttention
from launcher.contract.model_shape import ModelShape
from sft.models.rope import Rope
from sft.models.weight_map import WeightMap

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2"]
"""relu2 is the square of ReLU."""
Scores = Literal["softmax", "sigmoid"]
Norm = Literal["rms", "late_rounded_rms", "zero_centered_rms", "layer"]
"""RMSNorm, RMSNorm that is rounded after its product with the weight, RMSNorm that multiplies by 1 + weight, and
LayerNorm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryScale:
    """A factor on rotated queries that grows with the position: 1 + growth * log(1 + floor(position / every))."""

    growth: float
    every: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClampedUnit:
    """An expert's gated unit (up + 1) * gate * sigmoid(slope * gate), with both kept within a limit before.

    The gate is at most `limit`, the up projection between -limit and limit.
    """

    slope: float
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Causal self-attention of one layer."""

    heads: HeadSizes | None = None
    """The heads of this layer; None is those of the model."""
    rotary: bool = True
    """Whether queries and keys are rotated by their positions."""
    rope: Rope | None = None
    """Rotary positions of this layer; None is those of the model."""
    window: int | None = None
    """Number of positions that a token sees, itself included; None is all before it."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normed before RoPE ..."""
    norm_rotated: bool = False
    """... or, of those that are normed, after it."""
    value_norm: bool = False
    """Whether each head of values is normed, without a weight."""
    width_norm: bool = False
    """Whether all query heads are normed together before RoPE, and so are all key heads."""
    latent: LatentAttention | None = None
    """Where keys and values of all heads are made of one small vector a token; None where of the hidden state."""
    neighbour_pairs: bool = False
    """Whether the config, of a family that lets it say so, has neighbouring rows of files turn together. The weight map
    moves them apart; this is for a run's record, as frozen weights that are read in another order are other ones."""
    qkv_bias: bool = False
    """Of the products with the hidden state; with latents those that make them."""
    output_bias: bool = False
    softmax_scale: float | None = None
    """Factor on the scores; None is 1 / sqrt(head_dim)."""
    query_scale: QueryScale | None = None
    output_gate: bool = False
    """Whether each output is multiplied by the sigmoid of a number that the projection of queries also makes."""
    score_softcap: float | None = None
    """c: scores s become c * tanh(s / c) before the mask; None leaves them."""
    sinks: bool = False
    """Whether the softmax of each head has one more entry, a trained score that no value belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseMLP:
    """The feed-forward part of one layer."""

    width: int
    activation: Activation = "silu"
    gated: bool = True
    """Whether the activated gate multiplies the up projection."""
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedExpert:
    """A gated MLP that every token meets beside the experts that are chosen for it."""

    width: int
    weighted: bool
    """Whether each token's output is multiplied by the sigmoid of a product of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture of experts as the feed-forward part of one layer: gated MLPs, a few for each token."""

    count: int
    chosen: int
    """Experts of a token."""
    width: int
    """Of each expert."""
    normalized: bool
    """Whether the scores of the chosen experts are divided by their sum."""
    smallest_sum: float | None = None
    """What they are divided by if their sum is less; None for no bound."""
    scores: Scores = "softmax"
    """What the router makes of its logits."""
    selection_bias: bool = False
    """Whether a bias, which is never trained, is added to the scores by which experts are chosen."""
    router_bias: bool = False
    """Whether the router's logits have a bias, which is trained."""
    groups: int = 1
    """Experts are in equal groups ..."""
    chosen_groups: int = 1
    """... and a token's are chosen from this many, those with the highest sum of their best scores."""
    best_of_group: int = 2
    """How many scores of each group that sum has."""
    scaling: float = 1.0
    """Factor on the weights of a token's experts."""
    shared: SharedExpert | None = None
    beside_mlp: bool = False
    """Whether the shared expert is an MLP beside them: each of both has norms of its own before and behind it, and the
    router takes tokens as they come into the layer's feed-forward part. The layer then norms nothing before it."""
    scaled_router: bool = False
    """Whether the router norms tokens, without a weight, and multiplies them by trained numbers over the root of the
    hidden size; and each expert's weight by a trained number of its own."""
    activation: Activation = "silu"
    gated: bool = True
    clamped: ClampedUnit | None = None
    """The gated unit in place of activation(gate) * up; None for that."""
    bias: bool = False
    """Whether both products of an expert have a bias; the weight of a token multiplies the second one, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLayer:
    """One layer: h = x + m * after(attention(before(x))), then h + m * after(mlp(before(h)))."""

    attention: Attention | LinearAttention
    mlp: DenseMLP | Experts
    norm_before: bool = True
    """Whether `before` is a norm."""
    norm_after: bool = False
    """Whether `after` is a norm."""
    residual_multiplier: float = 1.0
    """m above."""
    scaled: bool = False
    """Whether the output is multiplied by a number that the files hold, which is never trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A whole model."""

    shape: ModelShape
    layers: tuple[DecoderLayer, ...]
    weights: WeightMap
    layernorm_epsilon: float
    rope: Rope | None
    """Rotary positions of the layers that have them and none of their own; None means learned positions, added to the
    embedding."""
    norm: Norm = "rms"
    """The kind of all norms."""
    embedding_multiplier: float = 1.0
    embedding_multiplier_is_rounded: bool = False
    """Whether the multiplier is rounded to the embedding's number type first."""
    logits_scaling: float = 1.0
    """Logits are divided by it."""
    logits_softcap: float | None = None
    """c: logits z become c * tanh(z / c); None leaves them."""

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention of each layer that has softmax attention, in their order."""
        return tuple(layer.attention for layer in self.layers if isinstance(layer.attention, Attention))

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary positions of the layers, the model's first."""
        own = [attention.rope for attention in self.attentions]
        return tuple(dict.fromkeys(rope for rope in (self.rope, *own) if rope is not None))

    def rope_of(self, attention: Attention) -> Rope | None:
        """Return the rotary positions of a layer."""
        return attention.rope or self.rope

    def head_dim_of(self, attention: Attention) -> int:
        """Return the size of a layer's heads, as far as rotary positions know of them."""
        return self.shape.rotary_dim if attention.heads is None else attention.heads.head_dim

    @property
    def rotations(self) -> tuple[tuple[Rope, int], ...]:
        """The different rotary positions of the layers, each with the size of the heads, the model's first."""
        own = [(self.rope_of(attention), self.head_dim_of(attention)) for attention in self.attentions]
        every = [(self.rope, self.shape.rotary_dim), *own]
        return tuple(dict.fromkeys((rope, size) for rope, size in every if rope is not None))

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(isinstance(layer.mlp, Experts) for layer in self.layers)
