"""What families that resemble Llama share: functions that a family calls for the parts it has in common.

Rejected: a Llama-like base class with a flag for each difference. Every new family would add a flag, and what a family
is made of would have to be read in two files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from launcher.contract.model_shape import ModelShape
from launcher.contract.model_types import MLP_NAMES
from sft.models.architecture import Activation, Attention, DecoderLayer, DenseMLP, Experts
from sft.models.config_reader import ConfigReader
from sft.models.rope import KINDS, Rope, read_rope, rope_settings
from sft.models.weight_map import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    SHARED_EXPERT,
    ParameterMap,
    Piece,
    WeightMap,
    vector,
    vocabulary,
    whole,
)

SMALL: Mapping[str, object] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""Sizes of a tiny model: several query heads for each KV head, and sizes that two and three ranks divide."""

SILU: Mapping[str, Activation] = {"silu": "silu"}
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Values of `hidden_act`: the one of nearly all models, and those that families take whose code asks for any."""

Layer = dict[str, ParameterMap]
"""Maps of one layer's parameters, by their names within the layer."""
LayerMap = Callable[[ModelShape, str], Layer]
"""Maps one layer, given the prefix of its tensors' names."""

QKV = "self_attention.linear_qkv.weight"
QKV_BIAS = "self_attention.linear_qkv.bias"
OUTPUT_BIAS = "self_attention.linear_proj.bias"
FC1 = "mlp.linear_fc1.weight"


# Reading a config ----------------------------------------------------------------------------------------------------


def rope_of(
    config: ConfigReader,
    *,
    partial: bool = False,
    default_theta: float = 10000.0,
    default_fraction: float = 1.0,
    kinds: Collection[str] = KINDS,
    understood: Collection[str] = (),
    values: Mapping[str, object] | None = None,
) -> Rope | None:
    """Return the RoPE settings.

    `partial` says that this family reads `partial_rotary_factor`, `kinds` which values of `rope_type` it takes, and
    `understood` which settings of single families it reads by itself. `values` are where to look if not in the config:
    families keep settings of some layers apart.
    """
    shape, values = config.shape, config.values if values is None else values
    rope, problems = read_rope(
        values,
        max_position_embeddings=shape.max_position_embeddings if config.values.get("max_position_embeddings") else None,
        partial=partial,
        default_theta=default_theta,
        default_fraction=default_fraction,
        understood=understood,
    )
    kind = rope_settings(values)["rope_type"]
    if rope is not None and kind not in kinds:
        problems = [f"rope_type {kind!r} is not supported for {shape.model_type}; only {' or '.join(map(repr, kinds))}"]
    if rope is not None and rope.pair_factors and len(rope.pair_factors) != rope.pairs(shape.rotary_dim):
        found, needed = len(rope.pair_factors), rope.pairs(shape.rotary_dim)
        problems = [f"short_factor has {found} numbers; {needed} pairs of each head are rotated"]
    for problem in problems:
        config.refuse(problem)
    return rope


def refuse_earlier_type(config: ConfigReader, scaling: Mapping[str, object]) -> None:
    """Refuse `type` in the `rope_scaling` of a family with a RoPE for each kind of layer: nobody would read it."""
    if "type" in scaling and "rope_type" not in scaling:
        config.refuse("rope_scaling with type: transformers reads rope_type alone in this family, and would not scale")


def refuse_untruncated(config: ConfigReader, **kinds: Mapping[str, object]) -> None:
    """Refuse YaRN's `truncate: false` in the RoPE settings of a kind of layer, by whose name they are given."""
    for kind, settings in kinds.items():
        if not settings.get("truncate", True):
            config.refuse(f"truncate false in rope_parameters.{kind} is not supported; transformers ignores it")


@dataclass(frozen=True, kw_only=True, slots=True)
class Biases:
    """Which linear layers have a bias."""

    attention: bool = False
    """Those of attention, its output included."""
    mlp: bool = False


NO_BIASES = Biases()


def biases_of(config: ConfigReader) -> Biases:
    """Return what `attention_bias` and `mlp_bias` say, as Llama's code reads them."""
    return Biases(attention=config.flag("attention_bias", default=False), mlp=config.flag("mlp_bias", default=False))


def window_of_every_layer(config: ConfigReader) -> int | None:
    """Return the sliding window of a family whose layers all have it, wherever the config states one."""
    if config.values.get("sliding_window") is None:
        return None
    return windows_of(config, [True] * config.shape.num_layers)[0]


def windows_by_layer(config: ConfigReader) -> list[int | None]:
    """Return each layer's window, by `layer_types` or else by `use_sliding_window` and `max_window_layers`."""
    layers = range(config.shape.num_layers)
    sliding = sliding_layers(config)
    if sliding is not None:
        return windows_of(config, sliding)
    if not config.values.get("use_sliding_window") or config.values.get("sliding_window") is None:
        return [None for _ in layers]
    first = config.number("max_window_layers", 28)
    return windows_of(config, [layer >= first for layer in layers])


def sliding_layers(config: ConfigReader) -> list[bool] | None:
    """Return which layers have a window by `layer_types`, or None without that list."""
    kinds = config.list_by_layer("layer_types")
    if kinds is None:
        return None
    for kind in sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}):
        config.refuse(f"layer_types has {kind!r}; only full_attention and sliding_attention are supported")
    return [kind != "full_attention" for kind in kinds]


def windows_of(config: ConfigReader, sliding: list[bool], default: int | None = None) -> list[int | None]:
    """Return `sliding_window` for the layers that slide, and None for the others."""
    window = config.values.get("sliding_window", default)
    if any(sliding) and not (isinstance(window, int) and window > 0):
        count = f"{sum(sliding)} of {len(sliding)}"
        config.refuse(f"{count} layers have a sliding window, and sliding_window is {window}")
    return [window if slides and isinstance(window, int) else None for slides in sliding]


def expert_layers(shape: ModelShape, attention: Attention, experts: Experts) -> tuple[DecoderLayer, ...]:
    """Return layers with this attention, and with experts or, where the shape says so, a dense MLP in their place."""
    dense = DenseMLP(width=shape.ffn_hidden_size, activation=experts.activation)
    return tuple(
        DecoderLayer(attention=attention, mlp=dense if index in shape.dense_layers else experts)
        for index in range(shape.num_layers)
    )


# Mapping weights -----------------------------------------------------------------------------------------------------


def weight_map(
    shape: ModelShape, layer: LayerMap, *, dense: LayerMap | None = None, carried: tuple[str, ...] = ()
) -> WeightMap:
    """Return the map of a model with Llama's names.

    `dense` maps those layers of a mixture of experts that have none. For `carried` see WeightMap.
    """
    kinds = [dense or layer if index in shape.dense_layers else layer for index in range(shape.num_layers)]
    return weight_map_of(shape, kinds, carried=carried)


def weight_map_of(shape: ModelShape, layers: Sequence[LayerMap], *, carried: tuple[str, ...] = ()) -> WeightMap:
    """Return the map of a model with Llama's names, whose layers have a map each."""
    hidden = shape.hidden_size
    embedding = "model.embed_tokens.weight"
    head = embedding if shape.tied_embeddings else "lm_head.weight"
    return WeightMap(
        outer={
            EMBEDDING: vocabulary(embedding, shape.vocab_size, hidden),
            FINAL_NORM: vector("model.norm.weight", hidden),
            OUTPUT: vocabulary(head, shape.vocab_size, hidden),
        },
        layers=tuple(kind(shape, f"model.layers.{index}.") for index, kind in enumerate(layers)),
        carried=carried,
    )


def llama_layer(shape: ModelShape, prefix: str, biases: Biases = NO_BIASES) -> Layer:
    """Return the maps of a layer of Llama's."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    maps = {
        "input_layernorm.weight": vector(f"{prefix}input_layernorm.weight", hidden),
        QKV: ParameterMap(blocks=(separate_qkv(shape, attention, "weight"),), columns=hidden),
        "self_attention.linear_proj.weight": whole(f"{attention}o_proj.weight", hidden, heads, split=1),
        "pre_mlp_layernorm.weight": vector(f"{prefix}post_attention_layernorm.weight", hidden),
        FC1: ParameterMap(blocks=separate_gate_and_up(shape, mlp), columns=hidden),
        "mlp.linear_fc2.weight": whole(f"{mlp}down_proj.weight", hidden, shape.ffn_hidden_size, split=1),
    }
    if biases.attention:
        maps |= {
            QKV_BIAS: ParameterMap(blocks=(separate_qkv(shape, attention, "bias"),)),
            OUTPUT_BIAS: vector(f"{attention}o_proj.bias", hidden),
        }
    if biases.mlp:
        maps |= {
            "mlp.linear_fc1.bias": ParameterMap(blocks=separate_gate_and_up(shape, mlp, "bias")),
            "mlp.linear_fc2.bias": vector(f"{mlp}down_proj.bias", hidden),
        }
    return maps


def attention_part(shape: ModelShape, prefix: str, biases: Biases = NO_BIASES) -> Layer:
    """Return the maps of a layer of Llama's without its MLP."""
    return {name: part for name, part in llama_layer(shape, prefix, biases).items() if not name.startswith("mlp.")}


def head_norms(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of the norms on the heads of queries and keys."""
    return {
        f"self_attention.{which}_layernorm.weight": vector(f"{prefix}self_attn.{which}_norm.weight", shape.head_dim)
        for which in ("q", "k")
    }


def separate_experts(shape: ModelShape, router: str, expert: str, names: tuple[str, str, str] = MLP_NAMES) -> Layer:
    """Return the maps of a mixture of experts whose files hold three matrices for each expert.

    `router` is the name of the router's weight, `expert` what the names of an expert's tensors begin with, its number
    in braces; `names` are those of gate, up and down projection.
    """
    hidden, width, experts = shape.hidden_size, shape.expert_ffn_hidden_size, range(shape.num_experts)
    gate, up, down = names
    halves = tuple(
        (Piece(f"{expert.format(number)}{half}.weight", 0, width),) for number in experts for half in (gate, up)
    )
    outputs = tuple((Piece(f"{expert.format(number)}{down}.weight", 0, hidden),) for number in experts)
    count = shape.num_experts
    return {
        "mlp.router.weight": whole(router, count, hidden, None),
        FC1: ParameterMap(blocks=halves, columns=hidden, experts=count),
        "mlp.linear_fc2.weight": ParameterMap(blocks=outputs, columns=width, split=1, experts=count),
    }


def joined_experts(shape: ModelShape, router: str, prefix: str) -> Layer:
    """Return the maps of experts of which two tensors hold all: first gate, then up rows, and the down projections.

    `router` is the name of the router's weight, `prefix` what the names of both tensors begin with.
    """
    hidden, width, count = shape.hidden_size, shape.expert_ffn_hidden_size, shape.num_experts
    halves = tuple(
        (Piece(f"{prefix}gate_up_proj", first, first + width, expert),)
        for expert in range(count)
        for first in (0, width)
    )
    outputs = tuple((Piece(f"{prefix}down_proj", 0, hidden, expert),) for expert in range(count))
    return {
        "mlp.router.weight": whole(router, count, hidden, None),
        FC1: ParameterMap(blocks=halves, columns=hidden, experts=count),
        "mlp.linear_fc2.weight": ParameterMap(blocks=outputs, columns=width, split=1, experts=count),
    }


def shared_expert(shape: ModelShape, prefix: str, *, weight: str | None = None) -> Layer:
    """Return the maps of the MLP that every token meets, and of the vector that weights its output if there is one.

    `prefix` is what the names of its tensors begin with, `weight` the name of the vector.
    """
    hidden, width = shape.hidden_size, shape.shared_expert_size
    halves = tuple((Piece(f"{prefix}{half}_proj.weight", 0, width),) for half in ("gate", "up"))
    found = {
        f"{SHARED_EXPERT}linear_fc1.weight": ParameterMap(blocks=halves, columns=hidden),
        f"{SHARED_EXPERT}linear_fc2.weight": whole(f"{prefix}down_proj.weight", hidden, width, split=1),
    }
    return found if weight is None else found | {"mlp.shared_weight.weight": whole(weight, 1, hidden, None)}


def separate_qkv(shape: ModelShape, prefix: str, kind: str) -> tuple[Piece, ...]:
    """Return the rows of linear_qkv from three tensors: q_proj, k_proj and v_proj behind `prefix`.

    Without a projection of values there are two tensors.
    """
    head = shape.head_dim
    queries = shape.num_attention_heads // shape.num_query_groups * head
    widths = {"q": queries, "k": head} | ({} if shape.keyed_values else {"v": head})
    return _by_group(shape, [(f"{prefix}{which}_proj.{kind}", 0, width) for which, width in widths.items()])


def joined_qkv(shape: ModelShape, name: str) -> tuple[Piece, ...]:
    """Return the rows of linear_qkv from one tensor that holds all query heads, then all keys, then all values."""
    head, groups = shape.head_dim, shape.num_query_groups
    queries = shape.num_attention_heads // groups * head
    return _by_group(
        shape, [(name, 0, queries), (name, groups * queries, head), (name, groups * (queries + head), head)]
    )


def _by_group(shape: ModelShape, parts: list[tuple[str, int, int]]) -> tuple[Piece, ...]:
    """Return, for each KV group in turn, its rows of each part: (tensor, the part's first row, rows of a group)."""
    return tuple(
        Piece(name, first + group * width, first + (group + 1) * width)
        for group in range(shape.num_query_groups)
        for name, first, width in parts
    )


def separate_gate_and_up(shape: ModelShape, prefix: str, kind: str = "weight") -> tuple[tuple[Piece, ...], ...]:
    """Return the two blocks of linear_fc1 from gate_proj and up_proj."""
    ffn = shape.ffn_hidden_size
    return (Piece(f"{prefix}gate_proj.{kind}", 0, ffn),), (Piece(f"{prefix}up_proj.{kind}", 0, ffn),)


def joined_gate_and_up(shape: ModelShape, name: str) -> tuple[tuple[Piece, ...], ...]:
    """Return the two blocks of linear_fc1 from one tensor that holds all gate rows, then all up rows."""
    ffn = shape.ffn_hidden_size
    return (Piece(name, 0, ffn),), (Piece(name, ffn, 2 * ffn),)
