"""A GGUF file -> a Hugging Face directory, once; its numbers are exactly those that inference of the file uses.

The `gguf` package unpacks each tensor to fp32 (4-bit blocks hold more digits than bf16 has: a scale and an offset
each), and it goes straight into the weight file. Config and tokenizer come from transformers' own GGUF reader.
llama.cpp stores the query and key rows of Llama-like models interleaved; they are put back in order.

Rejected: transformers' from_pretrained(gguf_file=...) for the weights. It needs accelerate besides, takes many times as
long, and passes over tensors it has no place for, among them the table of Llama 3's scaled RoPE.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from launcher.contract.errors import ModelError
from launcher.contract.gguf_shape import read_gguf_header
from sft.hf.files import check_model_files, write_weights
from sft.hf.gguf_metadata import split_as_stated, unread_settings
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from sft.models.stored_tensors import SINGLE

COVERED = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose tensors a GGUF holds under names of their own, unchanged but for the order of rows. Not so Gemma, to
whose norms llama.cpp adds 1."""

_INTERLEAVED = ("llama", "mistral")
"""Families whose RoPE llama.cpp computes on neighbouring pairs."""

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def convert_gguf(source: Path, directory: Path) -> None:
    """Write config, tokenizer and fp32 weights of `source` into `directory`, and check that nothing is missing."""
    try:
        import gguf
    except ImportError:
        raise ModelError(f"model.path: reading {source} needs the package gguf: pip install gguf") from None
    _write_config(source, directory)
    architecture = read_architecture(directory)
    if _kind(architecture) not in COVERED:
        raise ModelError(
            f"model.path: {source}: GGUF files of {_kind(architecture)} models are not converted, only those of "
            f"{', '.join(COVERED)}; use the Hugging Face directory"
        )
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"model.path: {source} is not a readable GGUF file ({error})") from None
    metadata, _ = read_gguf_header(source)
    unread = list(unread_settings(metadata, architecture.shape))
    if unread:
        raise ModelError(
            f"model.path: {source}: {', '.join(unread)} would not be read, and the model would compute something else; "
            "use the Hugging Face directory"
        )
    tensors = {}
    shapes = architecture.weights.hf_shapes()
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        if name not in shapes:
            raise ModelError(
                f"model.path: {source}: tensor {tensor.name} has no place in a {_kind(architecture)} model"
            )
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if values.shape != shapes[name]:
            raise ModelError(
                f"model.path: {source}: tensor {tensor.name} is {list(values.shape)}; by its metadata it should be "
                f"{list(shapes[name])}"
            )
        tensors[name] = _reordered(name, values, architecture)
    write_weights(tensors, directory / SINGLE)
    check_model_files(directory, architecture)


def hf_name(name: str) -> str:
    """Return Hugging Face's name of a GGUF tensor, or the name itself where there is none."""
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_TENSORS:
        return _MODEL_TENSORS.get(name, name)
    return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of heads whose RoPE pairs are neighbours (llama.cpp) in the order of two halves (transformers)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _reordered(name: str, values: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    shape = architecture.shape
    if shape.model_type in _INTERLEAVED and ".q_proj." in name:
        return deinterleave(values, shape.num_attention_heads)
    if shape.model_type in _INTERLEAVED and ".k_proj." in name:
        return deinterleave(values, shape.num_query_groups)
    return values


def _write_config(source: Path, directory: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer with its chat template."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model.path: {source}: transformers does not read it ({error})") from None
    metadata, _ = read_gguf_header(source)
    unknown = split_as_stated(tokenizer, metadata)
    if unknown is not None:
        raise ModelError(
            f"model.path: {source}: its tokenizer splits words in the way {unknown!r}, which is not known here "
            "(tokenizer.ggml.pre): texts would have other tokens than those the model knows; use its Hugging Face "
            "directory"
        )
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    stated |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[stated["model_type"]]], "dtype": "float32"}
    path.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def _kind(architecture: Architecture) -> str:
    return architecture.shape.model_type
