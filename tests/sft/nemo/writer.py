"""Writes NeMo 1.x checkpoints of a transformers model, by the documented layout, with none of the code under test."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

GPT = {
    "normalization": "layernorm",
    "activation": "gelu",
    "bias": True,
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": True,
}
LLAMA = {
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 1,
    "share_embeddings_and_output_weights": False,
    "bias_activation_fusion": False,
}


def model_settings(config: Any, *, legacy: bool) -> dict[str, Any]:
    """Return model_config.yaml of a transformers config."""
    gpt = config.model_type == "gpt2"
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.n_inner if gpt else config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "layernorm_epsilon": config.layer_norm_epsilon if gpt else config.rms_norm_eps,
        "override_vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": 8,
        "megatron_legacy": legacy,
        "mcore_gpt": False,
        "encoder_seq_length": 64,
        "tokenizer": {"library": "huggingface", "type": "x", "vocab_file": None},
        **(GPT if gpt else LLAMA | {"rotary_base": config.rope_parameters["rope_theta"]}),
    }


def whole_names(model: Any) -> dict[str, Tensor]:
    """Return whole tensors by NeMo's own names, with query, key and value as three."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return _gpt2_names(state) if model.config.model_type == "gpt2" else _llama_names(state)


def _gpt2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {
        "embedding.word_embeddings.weight": state["transformer.wte.weight"],
        "embedding.position_embeddings.weight": state["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"encoder.final_layernorm.{kind}"] = state[f"transformer.ln_f.{kind}"]
    for layer in {int(name.split(".")[2]) for name in state if name.startswith("transformer.h.")}:
        theirs, ours = f"transformer.h.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            found[f"{ours}input_layernorm.{kind}"] = state[f"{theirs}ln_1.{kind}"]
            found[f"{ours}post_attention_layernorm.{kind}"] = state[f"{theirs}ln_2.{kind}"]
            for here, there in (("self_attention.dense", "attn.c_proj"), ("mlp.dense_h_to_4h", "mlp.c_fc")):
                found[f"{ours}{here}.{kind}"] = state[f"{theirs}{there}.{kind}"].t()
            found[f"{ours}mlp.dense_4h_to_h.{kind}"] = state[f"{theirs}mlp.c_proj.{kind}"].t()
            for which, part in zip("qkv", state[f"{theirs}attn.c_attn.{kind}"].t().chunk(3), strict=True):
                found[f"{ours}{which}.{kind}"] = part
    return found


def _llama_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "encoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    for layer in {int(name.split(".")[2]) for name in state if name.startswith("model.layers.")}:
        theirs, ours = f"model.layers.{layer}.", f"encoder.layers.{layer}."
        for here, there in (
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_h_to_4h", "mlp.gate_proj"),
            ("mlp.dense_h_to_4h_2", "mlp.up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
            ("q", "self_attn.q_proj"),
            ("k", "self_attn.k_proj"),
            ("v", "self_attn.v_proj"),
        ):
            found[f"{ours}{here}.weight"] = state[f"{theirs}{there}.weight"]
    return found


def rank_state(
    names: dict[str, Tensor], config: Any, tp: int, pp: int, rank: int, stage: int, legacy: bool
) -> dict[str, Tensor]:
    """Return what one rank's file holds."""
    layers = config.num_hidden_layers // pp
    heads = config.num_attention_heads // tp
    state: dict[str, Tensor] = {}
    for name, tensor in names.items():
        if name.startswith("encoder.layers."):
            _, _, number, rest = name.split(".", 3)
            if int(number) // layers != stage or rest.startswith(("k.", "v.")):
                continue
            local = f"model.language_model.encoder.layers.{int(number) % layers}."
            kind = rest.rpartition(".")[2]
            if rest.startswith("q."):
                three = [names[f"encoder.layers.{number}.{which}.{kind}"].chunk(tp)[rank] for which in "qkv"]
                by_head = torch.stack([part.unflatten(0, (heads, -1)) for part in three], dim=0 if legacy else 1)
                state[f"{local}self_attention.query_key_value.{kind}"] = by_head.flatten(0, 2)
            else:
                state[f"{local}{rest}"] = _share(rest, tensor, tp, rank)
        elif stage == (0 if name.startswith("embedding.") else pp - 1):
            state[f"model.language_model.{name}"] = _share(name, tensor, tp, rank)
    if stage == pp - 1 and pp > 1 and "output_layer.weight" not in names:
        embedding = names["embedding.word_embeddings.weight"]
        state["model.word_embeddings.weight"] = _share("word_embeddings.weight", embedding, tp, rank)
    return {name: tensor.clone() for name, tensor in state.items()}


def _share(name: str, tensor: Tensor, tp: int, rank: int) -> Tensor:
    """Return a tensor-parallel rank's part."""
    if "word_embeddings" in name or "output_layer" in name:
        padded = -(-len(tensor) // (8 * tp)) * 8 * tp
        tensor = torch.cat([tensor, torch.full((padded - len(tensor), tensor.shape[1]), 7.0)])
        return tensor.chunk(tp)[rank]
    if "dense_h_to_4h" in name:
        return tensor.chunk(tp)[rank]
    if name.endswith(("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")):
        return tensor.chunk(tp, dim=1)[rank]
    return tensor


def write_checkpoint(model: Any, directory: Path, *, tp: int, pp: int, legacy: bool = False) -> Path:
    """Write a folder as an unpacked .nemo archive has it, and return it."""
    directory.mkdir(parents=True)
    (directory / "model_config.yaml").write_text(yaml.safe_dump(model_settings(model.config, legacy=legacy)))
    names = whole_names(model)
    for stage in range(pp):
        for rank in range(tp):
            folder = directory
            if pp > 1:
                folder = directory / f"tp_rank_{rank:02}_pp_rank_{stage:03}"
            elif tp > 1:
                folder = directory / f"mp_rank_{rank:02}"
            folder.mkdir(exist_ok=True)
            torch.save(rank_state(names, model.config, tp, pp, rank, stage, legacy), folder / "model_weights.ckpt")
    return directory


def archive(directory: Path, target: Path) -> Path:
    """Write the folder as a .nemo archive, and return its path."""
    with tarfile.open(target, "w") as tar:
        tar.add(directory, arcname="./")
    return target
