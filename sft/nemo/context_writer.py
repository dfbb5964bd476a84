"""The `context/` of a NeMo 2 checkpoint: which model object NeMo is to build, as io.json and model.yaml.

io.json is a Fiddle configuration in its JSON form (https://github.com/google/fiddle, experimental/serialization.py):
a graph of classes by name and their arguments, without pickles. Arguments that are left out take the defaults of NeMo's
class. model.yaml says the same for people, and for `launcher.contract.nemo.context`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.contract.errors import ModelError
from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, DecoderLayer

TOKENIZER = "nemo_tokenizer"

_GPT = "nemo.collections.llm.gpt.model"
CLASSES = {
    "gpt2": (f"{_GPT}.base", "GPTModel", "GPTConfig"),
    "llama": (f"{_GPT}.llama", "LlamaModel", "LlamaConfig"),
    "mistral": (f"{_GPT}.mistral", "MistralModel", "MistralConfig7B"),
    "qwen2": (f"{_GPT}.qwen2", "Qwen2Model", "Qwen2Config"),
    "qwen3": (f"{_GPT}.qwen3", "Qwen3Model", "Qwen3Config"),
}
"""Family -> module, model class, configuration class."""
_LLAMA31 = "Llama31Config"
_PLAIN = {"rotary_percent": 1.0, "add_bias_linear": False, "gated_linear_unit": True, "normalization": "RMSNorm"}
_TOKENIZER_CLASS = ("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer")


@dataclass(frozen=True, slots=True)
class Name:
    """Something that Python imports: a class, a function, a number type."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """An object that NeMo builds: a class and its arguments."""

    of: Name
    arguments: Mapping[str, object] = field(default_factory=dict)


def model_object(architecture: Architecture, dtype: str) -> Built:
    """Return NeMo's model object, with parameters of `dtype` (such as bfloat16), or raise ModelError."""
    shape = architecture.shape
    if shape.model_type not in CLASSES:
        raise ModelError(
            f"a {shape.model_type} model cannot be written for NeMo 2; these can: {', '.join(sorted(CLASSES))}"
        )
    absent = _absent_in_nemo(architecture)
    if absent is not None:
        raise ModelError(
            f"a {shape.model_type} model with {absent} cannot be written for NeMo 2, whose classes have none"
        )
    module, model, config = CLASSES[shape.model_type]
    fields = _sizes(shape, dtype) | {"layernorm_epsilon": architecture.layernorm_epsilon}
    layer, attention = (
        architecture.layers[0],
        architecture.attentions[0],
    )  # NeMo's classes know models of equal layers only
    if architecture.rope is None:
        fields |= _gpt2(layer)
    else:
        scaling = _rope(architecture)
        fields |= _PLAIN | scaling | {"position_embedding_type": "rope", "activation_func": _function("silu")}
        config = _LLAMA31 if "scale_factor" in scaling else config
        if shape.model_type == "mistral":
            window = attention.window
            fields |= {"window_size": [window, 0] if window else None, "cp_comm_type": None}
        if shape.model_type in ("qwen2", "qwen3"):
            fields |= {"add_qkv_bias": attention.qkv_bias, "qk_layernorm": attention.qk_norm}
    tokenizer = Built(of=Name(*_TOKENIZER_CLASS), arguments={"pretrained_model_name": TOKENIZER})
    built = Built(of=Name(module, config), arguments=fields)
    return Built(of=Name(module, model), arguments={"config": built, "tokenizer": tokenizer})


def _absent_in_nemo(architecture: Architecture) -> str | None:
    """Return what of a model NeMo's classes do not have, or None."""
    rope = architecture.rope
    if architecture.weights.language_prefix is not None:
        return "parts beside the language model"
    if rope is None:
        return None  # GPT-2, whose class has what such a model can have
    if rope.yarn is not None:
        return "YaRN positions"
    if rope.longest is not None:
        return "positions that depend on the length of a batch"
    biases = *(layer.mlp.bias for layer in architecture.layers), *(own.output_bias for own in architecture.attentions)
    if any(biases):
        return "biases on its attention's output or its MLP"
    if any(layer.mlp.activation != "silu" for layer in architecture.layers):
        return "an activation other than SiLU"
    return None


def _sizes(shape: ModelShape, dtype: str) -> dict[str, object]:
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "seq_length": shape.max_position_embeddings,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "params_dtype": Name("torch", dtype),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
    }


def _gpt2(layer: DecoderLayer) -> dict[str, object]:
    return {
        "normalization": "LayerNorm",
        "activation_func": _function("gelu"),
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
        # Megatron-core's fused bias and gelu use the tanh form, F.gelu the exact one.
        "bias_activation_fusion": layer.mlp.activation == "gelu_tanh",
    }


def _rope(architecture: Architecture) -> dict[str, object]:
    rope = architecture.rope
    assert rope is not None  # only GPT-2 has none
    fields: dict[str, object] = {"rotary_base": rope.theta}
    if rope.llama3 is None:
        return fields | ({"seq_len_interpolation_factor": rope.factor} if rope.factor != 1 else {})
    if architecture.shape.model_type != "llama":
        raise ModelError("Llama 3's RoPE scaling in another model cannot be written for NeMo 2")
    return fields | {
        "scale_factor": rope.factor,
        "low_freq_factor": rope.llama3.low_freq_factor,
        "high_freq_factor": rope.llama3.high_freq_factor,
        "old_context_len": rope.llama3.original_positions,
    }


def _function(name: str) -> Name:
    return Name("torch._C._nn", "gelu") if name == "gelu" else Name("torch.nn.functional", name)


def model_yaml(built: Built) -> dict[str, object]:
    """Return the object as nested mappings, each with its class."""

    def plain(value: object) -> object:
        if isinstance(value, Built):
            return model_yaml(value)
        return {"_target_": str(value), "_call_": False} if isinstance(value, Name) else value

    return {"_target_": str(built.of), **{key: plain(value) for key, value in built.arguments.items()}}


def io_json(model: Built) -> dict[str, object]:
    """Return Fiddle's JSON of a trainer context that holds `model` and a trainer with NeMo's defaults."""
    graph = _Graph()
    context = Built(
        of=Name("nemo.lightning.io.pl", "TrainerContext"),
        arguments={"model": model, "trainer": Built(of=Name("nemo.lightning.pytorch.trainer", "Trainer"))},
    )
    root = graph.add(context, "<root>")
    return {"root": root, "objects": graph.objects, "refcounts": graph.counts, "version": "0.0.1"}


class _Graph:
    """Objects by key, in the order in which they can be built."""

    def __init__(self) -> None:
        self.objects: dict[str, object] = {}
        self.counts: dict[str, int] = {}

    def add(self, value: object, path: str) -> dict[str, object]:
        """Enter a value and what it is made of, and return the JSON that stands for it."""
        if isinstance(value, Name):
            return _imported(value) | {"paths": [path]}
        if isinstance(value, list):
            items = [[f"Index(index={i})", self.add(item, f"{path}[{i}]")] for i, item in enumerate(value)]
            return self._enter("list", _container("list", items) | {"paths": [path]})
        if not isinstance(value, Built):
            return {"type": "leaf", "value": value, "paths": [path]}
        arguments = [
            [f"Attr(name={name!r})", self.add(part, f"{path}.{name}")] for name, part in value.arguments.items()
        ]
        described = {
            "type": _imported(Name("fiddle._src.config", "Config")),
            "items": arguments,
            "metadata": self._description(value),
            "paths": [path],
        }
        return self._enter(re.sub(r"(?<!^)(?=[A-Z])", "_", value.of.name).lower(), described)

    def _description(self, value: Built) -> dict[str, object]:
        """Return Fiddle's record of the class, its arguments' names, and their (empty) tags and history."""
        names = [[f"Index(index={i})", name] for i, name in enumerate(value.arguments)]
        kind = _imported(Name("fiddle._src.config", "BuildableTraverserMetadata"))
        items = [
            ["Attr(name='fn_or_cls')", _imported(value.of)],
            ["Attr(name='argument_names')", self._enter("tuple", _container("tuple", names))],
            ["Attr(name='argument_tags')", self._enter("dict", _container("dict", []) | {"metadata": _NO_KEYS})],
            ["Attr(name='argument_history')", self._enter("dict", _container("dict", []) | {"metadata": _NO_KEYS})],
        ]
        return self._enter("buildable_traverser_metadata", {"type": kind, "items": items, "metadata": kind})

    def _enter(self, kind: str, value: Mapping[str, object]) -> dict[str, object]:
        key = f"{kind}_{1 + sum(name.rpartition('_')[0] == kind for name in self.objects)}"
        self.objects[key] = value
        self.counts[key] = 1
        return {"type": "ref", "key": key}


def _imported(name: Name) -> dict[str, object]:
    return {"type": "pyref", "module": name.module, "name": name.name}


def _container(kind: str, items: Sequence[object]) -> dict[str, object]:
    return {"type": _imported(Name("builtins", kind)), "items": items, "metadata": None}


_NO_KEYS = _container("tuple", [])
"""Fiddle's record of a dictionary: the order of its keys."""
