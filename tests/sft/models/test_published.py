"""Configs as the hub has them: what they leave out means what transformers means, and positions rotate alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.contract.errors import ModelError
from launcher.contract.flops import parameters
from launcher.contract.model_shape import named_model_config
from launcher.contract.spec import RunSpec
from sft.models.registry import read_architecture
from sft.models.rope import Rope
from tests.sft.models.test_architecture import shape_free_of_positions

GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {  # heads, their sizes and the vocabulary are transformers' defaults
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
GEMMA4_31B = {
    "model_type": "gemma4",
    "text_config": {  # kinds of layers and their positions are transformers' defaults
        "model_type": "gemma4_text",
        "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 5376,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 21504,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_global_key_value_heads": 4,
        "num_hidden_layers": 60,
        "num_key_value_heads": 16,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
        "vocab_size": 262144,
    },
}
MISTRAL_SMALL = {
    "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
}
MINISTRAL3_8B = {
    "model_type": "ministral3",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None,
    "vocab_size": 131072,
}
PHI4_MINI = {
    "model_type": "phi3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + 0.8 * pair for pair in range(48)],
        "short_factor": [1.0 + 0.01 * pair for pair in range(48)],
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
OLMO3_7B = {
    "model_type": "olmo3",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "vocab_size": 100278,
}
GLM_45_AIR = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
GLM4_9B = {
    "model_type": "glm4",
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151552,
}
SEED_OSS_36B = {
    "model_type": "seed_oss",
    "attention_bias": True,
    "attention_dropout": 0.1,
    "attention_out_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 524288,
    "mlp_bias": False,
    "num_attention_heads": 80,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "residual_dropout": 0.1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"rope_type": "default"},
    "rope_theta": 10000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 155136,
}
EXAONE4_32B = {
    "model_type": "exaone4",
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
    "max_position_embeddings": 131072,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "tie_word_embeddings": False,
    "vocab_size": 102400,
}
ERNIE_03B = {
    "model_type": "ernie4_5",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 131072,
    "num_attention_heads": 16,
    "num_hidden_layers": 18,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "tie_word_embeddings": True,
    "use_bias": False,
    "vocab_size": 103424,
}
ERNIE_21B_A3B = {
    "model_type": "ernie4_5_moe",
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_bias": False,
    "vocab_size": 103424,
}
HUNYUAN_7B = {
    "model_type": "hunyuan_v1_dense",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cla": False,
    "use_qk_norm": True,
    "vocab_size": 128167,
}
MINIMAX_M2 = {  # of a copy in bf16: the published one has a quantization_config
    "model_type": "minimax_m2",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
DOTS_LLM1 = {
    "model_type": "dots1",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 32768,
    "max_window_layers": 62,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 62,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "vocab_size": 152064,
}
AFM_45B = {
    "model_type": "arcee",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "max_position_embeddings": 65536,
    "mlp_bias": False,
    "num_attention_heads": 20,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 20.0,
        "mscale": 1.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128004,
}
STARCODER2_7B = {
    "model_type": "starcoder2",
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 18432,
    "max_position_embeddings": 16384,
    "norm_epsilon": 1e-05,
    "num_attention_heads": 36,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "residual_dropout": 0.1,
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "use_bias": True,
    "vocab_size": 49152,
}
OLMOE_1B_7B = {
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}
QWEN15_MOE = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
GPT_OSS_120B = {
    **GPT_OSS_20B,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
}
QWEN3_NEXT_80B = {
    **named_model_config("80b-a3b"),
    "attention_bias": False,
    "hidden_act": "silu",
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "router_aux_loss_coef": 0.001,
}
QWEN3_5_35B_A3B = {
    "model_type": "qwen3_5_moe",
    "text_config": {
        **named_model_config("qwen3.5-35b-a3b"),
        "attn_output_gate": True,
        "hidden_act": "silu",
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
        "mtp_num_hidden_layers": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **named_model_config("671b-a37b"),
        "aux_loss_alpha": 0.001,
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "rms_norm_eps": 1e-06,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "deepseek_v2": {
        **named_model_config("16b-a2b"),
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "n_group": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "glm4_moe_lite": {**named_model_config("30b-a3b-flash"), "hidden_act": "silu", "attention_bias": False},
    "deepseek_v3 of 16b": {**named_model_config("16b-a3b"), "hidden_act": "silu", "seq_aux": True},
    "qwen3_5": {"model_type": "qwen3_5", "text_config": named_model_config("qwen3.5-9b")},
    "qwen3_5_moe": QWEN3_5_35B_A3B,
    "qwen3_next": QWEN3_NEXT_80B,
    "gpt_oss": GPT_OSS_20B,
    "gpt_oss 120b": GPT_OSS_120B,
    "glm4": GLM4_9B,
    "glm4_moe": GLM_45_AIR,
    "exaone4": EXAONE4_32B,
    "ernie4_5": ERNIE_03B,
    "ernie4_5_moe": ERNIE_21B_A3B,
    "hunyuan_v1_dense": HUNYUAN_7B,
    "minimax_m2": MINIMAX_M2,
    "dots1": DOTS_LLM1,
    "arcee": AFM_45B,
    "starcoder2": STARCODER2_7B,
    "seed_oss": SEED_OSS_36B,
    "olmoe": OLMOE_1B_7B,
    "qwen2_moe": QWEN15_MOE,
    "qwen3_moe": QWEN3_30B_A3B,
    "gemma3": GEMMA3_4B,
    "gemma4": GEMMA4_31B,
    "mistral3": MISTRAL_SMALL,
    "ministral3": MINISTRAL3_8B,
    "phi3": PHI4_MINI,
    "olmo3": OLMO3_7B,
    # transformers gives layers with a window its own theta whatever stands at top level
    "olmo3 of another theta": {**OLMO3_7B, "rope_theta": 10000.0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    written, filled = tmp_path / "written", tmp_path / "filled"
    for directory in (written, filled):
        directory.mkdir()
    (written / "config.json").write_text(json.dumps(CONFIGS[name]))
    AutoConfig.from_pretrained(written).save_pretrained(filled)
    found = read_architecture(written)
    assert shape_free_of_positions(found) == shape_free_of_positions(read_architecture(filled))
    assert found.shape.hidden_size == CONFIGS[name].get("text_config", CONFIGS[name])["hidden_size"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek_v3", 671.0),
        ("deepseek_v2", 15.71),
        ("deepseek_v3 of 16b", 15.96),
        ("glm4_moe_lite", 29.9),
        ("ernie4_5_moe", 21.8),
        ("glm4_moe", 106.9),
        ("dots1", 142.8),
        ("minimax_m2", 228.7),
        ("gpt_oss", 20.9),
        ("gpt_oss 120b", 116.8),
        ("olmoe", 6.92),
        ("qwen2_moe", 14.3),
        ("qwen3_moe", 30.5),
        ("qwen3_5_moe", 34.7),
        ("qwen3_next", 79.7),
    ],
)
def test_the_weights_of_published_models_with_experts(name: str, billions: float, tmp_path: Path) -> None:
    """As their cards have them, and none has the loss for even loads by its config."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    assert parameters(read_architecture(tmp_path).shape) / 1e9 == pytest.approx(billions, rel=3e-3)
    assert RunSpec().train.router_aux_loss == 0


def expect_rotation(rope: Rope | None, theirs: torch.Tensor, magnitude: float, head_dim: int = 128) -> None:
    assert rope is not None
    assert torch.equal(rope.inverse_frequencies(head_dim), theirs)
    assert rope.attention_factor == pytest.approx(magnitude, rel=1e-12)


def test_positions_rotate_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
    from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    def read(name: str) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
        return read_architecture(tmp_path), AutoConfig.from_pretrained(tmp_path)

    architecture, config = read("phi3")
    expect_rotation(architecture.rope, (rotary := Phi3RotaryEmbedding(config)).inv_freq, rotary.attention_scaling)
    assert architecture.rope.longest == 4096
    architecture, config = read("gpt_oss")
    rotary = GptOssRotaryEmbedding(config)
    expect_rotation(architecture.rope, rotary.inv_freq, rotary.attention_scaling, head_dim=64)
    assert [layer.attention.window for layer in architecture.layers[:2]] == [128, None]
    architecture, config = read("ministral3")
    expect_rotation(architecture.rope, (rotary := Ministral3RotaryEmbedding(config)).inv_freq, rotary.attention_scaling)
    for name in ("olmo3", "olmo3 of another theta"):
        architecture, config = read(name)
        rotary = Olmo3RotaryEmbedding(config)
        expect_rotation(architecture.rope, rotary.full_attention_inv_freq, rotary.full_attention_attention_scaling)
        in_window = architecture.attentions[0].rope
        expect_rotation(in_window, rotary.sliding_attention_inv_freq, rotary.sliding_attention_attention_scaling)


def test_latents_rotate_and_scale_as_in_transformers(tmp_path: Path) -> None:
    """YaRN's frequencies are those of the rotated part of a head, and its softmax scale is of the whole head."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    for name in ("deepseek_v3", "deepseek_v3 of 16b", "glm4_moe_lite"):
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
        architecture, config = read_architecture(tmp_path), AutoConfig.from_pretrained(tmp_path)
        rotary = DeepseekV3RotaryEmbedding(config)
        expect_rotation(architecture.rope, rotary.inv_freq, rotary.attention_scaling, architecture.shape.rotary_dim)
        with torch.device("meta"):
            assert architecture.attentions[0].softmax_scale == DeepseekV3Attention(config, 0).scaling


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen3_next"])
def test_positions_of_text_rotate_as_in_transformers(name: str, tmp_path: Path) -> None:
    """A quarter of each head, and the three kinds of positions of images are one."""
    from transformers import AutoConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    architecture, config = read_architecture(tmp_path), AutoConfig.from_pretrained(tmp_path).get_text_config()
    kind = Qwen3NextRotaryEmbedding if name == "qwen3_next" else Qwen3_5TextRotaryEmbedding
    rotary = kind(config)
    expect_rotation(architecture.rope, rotary.inv_freq, rotary.attention_scaling, architecture.shape.head_dim)
    positions = torch.arange(50)[None]
    cos, _ = rotary(torch.zeros(1), positions)
    angles = positions[0, :, None].float() * rotary.inv_freq
    assert torch.equal(cos[0], torch.cat([angles, angles], dim=-1).cos())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"attn_output_gate": False}, "attn_output_gate false is not supported"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim 1 is not supported; it must be above 1"),
        ({"layer_types": ["linear_attention"] * 48}, "no layer has full attention; at least one must"),
        (
            {"layer_types": ["sliding_attention", *["full_attention"] * 47]},
            "layer_types has 'sliding_attention'; only full_attention and linear_attention are supported",
        ),
        ({"linear_num_value_heads": 24}, "linear_num_key_heads 16, linear_num_value_heads 24"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim None"),
        ({"full_attention_interval": 0}, "full_attention_interval 0 is not a whole number above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_linear_attention_is_not_built_for(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_NEXT_80B | change))
    with pytest.raises(ModelError) as caught:
        read_architecture(tmp_path)
    assert problem in str(caught.value)


def test_gpt_oss_states_its_positions(tmp_path: Path) -> None:
    """Seen to be plain with null, for which transformers takes YaRN by 32."""
    config = {key: value for key, value in GPT_OSS_20B.items() if key != "rope_scaling"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": None}))
    with pytest.raises(ModelError, match="no rope_parameters, which a gpt_oss config must state"):
        read_architecture(tmp_path)
