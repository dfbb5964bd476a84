"""Every covered family is read in both config forms; every setting that is not covered is refused with its value."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import ModelError
from launcher.contract.flops import parameters
from launcher.contract.usual_keys import language_model_config
from sft.models import families
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.registry import SUPPORTED, family, read_architecture
from sft.models.rope import Llama3Scaling, Rope
from tests.sft.hf_cases import CASES, save_config

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.0, 1.0, 2.0], "long_factor": [2.0, 2.0, 2.0, 8.0]}
SHORT = {**LONGROPE, "short_factor": [1.0]}


def write_config(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def refusal(directory: Path, **changes: Any) -> list[str]:
    with pytest.raises(ModelError) as caught:
        read_architecture(write_config(directory, **changes))
    where = f"{directory / 'config.json'}: "
    assert all(problem.startswith(where) for problem in caught.value.problems)
    return [problem.removeprefix(where) for problem in caught.value.problems]


def windows(architecture: Architecture) -> list[int | None]:
    return [attention.window for attention in architecture.attentions]


def test_plain_llama(tmp_path: Path) -> None:
    architecture = read_architecture(write_config(tmp_path))

    assert architecture.shape.head_dim == 8
    assert architecture.layernorm_epsilon == 1e-5
    assert architecture.rope == Rope(theta=10000.0)
    assert architecture.layers == (DecoderLayer(attention=Attention(), mlp=DenseMLP(width=72)),) * 4
    assert (architecture.norm, architecture.embedding_multiplier, architecture.logits_scaling) == ("rms", 1.0, 1.0)
    assert windows(architecture) == [None] * 4


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
        {"rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}, "rope_theta": 500000},
    ],
    ids=["transformers 5", "transformers 4", "key type"],
)
def test_rope_is_read_from_old_and_new_places(tmp_path: Path, rope: dict[str, Any]) -> None:
    for value in rope.values():
        if isinstance(value, dict) and value.get("rope_type") is None:
            value.pop("rope_type", None)
    architecture = read_architecture(write_config(tmp_path, **rope))

    llama3 = Llama3Scaling(low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    assert architecture.rope == Rope(theta=500000.0, factor=32.0, llama3=llama3)


def test_old_default_rope_scaling_of_null(tmp_path: Path) -> None:
    architecture = read_architecture(write_config(tmp_path, rope_scaling=None, rope_theta=1000000.0))

    assert architecture.rope == Rope(theta=1000000.0)


def test_what_families_imply(tmp_path: Path) -> None:
    qwen2 = read_architecture(write_config(tmp_path, model_type="qwen2", attention_bias=True))
    qwen3 = read_architecture(write_config(tmp_path, model_type="qwen3", head_dim=16))
    mistral = read_architecture(write_config(tmp_path, model_type="mistral", sliding_window=None))

    assert {layer.attention for layer in qwen2.layers} == {Attention(qkv_bias=True)}
    assert {layer.attention for layer in qwen3.layers} == {Attention(qk_norm=True)}
    assert {layer.attention for layer in mistral.layers} == {Attention()}
    assert qwen3.shape.head_dim == 16


@pytest.mark.parametrize("activation", [{}, {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}])
def test_gemma(tmp_path: Path, activation: dict[str, Any]) -> None:
    """The first files leave tied embeddings out, and call the activation by another's name."""
    gemma = read_architecture(write_config(tmp_path, model_type="gemma", head_dim=16, **activation))

    assert {layer.mlp.activation for layer in gemma.layers} == {"gelu_tanh"}
    assert (gemma.norm, gemma.embedding_multiplier) == ("zero_centered_rms", 48**0.5)
    assert gemma.shape.tied_embeddings


def test_phi3(tmp_path: Path) -> None:
    phi3 = read_architecture(
        write_config(tmp_path, model_type="phi3", partial_rotary_factor=0.75, sliding_window=2047, rope_scaling=None)
    )

    assert (windows(phi3), phi3.rope) == ([2047] * 4, Rope(theta=10000.0, fraction=0.75))
    assert "model.layers.0.self_attn.qkv_proj.weight" in phi3.weights.hf_shapes()


def test_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    assert refusal(tmp_path, model_type="gpt_neo") == [
        "model_type 'gpt_neo' is not supported; supported are " + ", ".join(SUPPORTED)
    ]


def test_a_family_that_looks_covered_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert refusal(tmp_path, model_type="deepseek_v32") == [
        "model_type 'deepseek_v32' is not supported (each token sees few of those before it, which a part of its "
        "attention chooses); supported are " + ", ".join(SUPPORTED)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_act": "relu"},
            "hidden_act 'relu' is not supported; only 'silu' or 'swish' or 'gelu' or 'gelu_new' or 'gelu_pytorch_tanh'",
        ),
        (
            {"model_type": "mistral", "sliding_window": None, "attention_bias": True},
            "attention_bias true is not supported",
        ),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias true is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported for model type llama"),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
            "the RoPE setting mrope_section [8, 12, 12] is not supported for this model type",
        ),
        (
            {"rope_scaling": {"type": "su", "factor": 2.0}},
            "rope_type 'su' is not supported; supported are 'default', "
            "'dynamic', 'linear', 'llama3', 'longrope', 'yarn'",
        ),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type 'dynamic' without a number for factor"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config: quantized weights are not supported; use the unquantized model",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; only 1.0"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "RoPE settings that differ between layers are not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "beta_fast": "many"}},
            "rope_type 'yarn' without a number for factor, beta_fast",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5}},
            "rope_type 'yarn' with an attention factor of 0.5, below 1",
        ),
        (
            {"model_type": "phi3", "rope_scaling": LONGROPE},
            "no original_max_position_embeddings, which a phi3 config must state",
        ),
        (
            {"model_type": "phi3", "original_max_position_embeddings": 64, "rope_scaling": SHORT},
            "short_factor has 1 numbers; 4 pairs of each head are rotated",
        ),
        (
            {"rope_scaling": {**LONGROPE, "short_factor": "many"}},
            "rope_type 'longrope' without a list of numbers for short_factor",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_type 'yarn' is not supported for phi3; only 'default' or 'longrope'",
        ),
        (
            {"model_type": "ministral3", "head_dim": 16, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters must state llama_4_scaling_beta and original_max_position_embeddings; they are None and "
            "None",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "the RoPE setting llama_4_scaling_beta 0.1 is not supported for this model type",
        ),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "rope_type 'llama3' with low_freq_factor 4.0 and high_freq_factor 4.0; the first must be above 0 and below "
            "the second",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0}},
            "rope_type 'llama3' without a number for factor, high_freq_factor",
        ),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "rope_type 'linear' without a number for factor",
        ),
        (
            {"model_type": "gemma", "head_dim": 16, "hidden_act": "silu"},
            "hidden_act 'silu' is not supported; only 'gelu_pytorch_tanh' or 'gelu'",
        ),
        (
            {"model_type": "gemma", "head_dim": 16, "use_bidirectional_attention": True},
            "use_bidirectional_attention True is not supported for model type gemma",
        ),
        ({"is_causal": False}, "is_causal false is not supported"),
        (
            {"model_type": "phi3", "partial_rotary_factor": None, "sliding_window": None},
            "partial_rotary_factor None is not a number",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": None},
            "max_window_layers None is not a number",
        ),
        (
            {"model_type": "gemma3_text", "head_dim": 16, "sliding_window_pattern": 0},
            "sliding_window_pattern 0 is not above 0",
        ),
        (
            {"compression_config": {"format": "pack-quantized"}},
            "compression_config: quantized weights are not supported; use the unquantized model",
        ),
        (
            {"model_type": "mistral"},
            "no sliding_window, which a mistral config must state",
        ),
        (
            {"model_type": "qwen3"},
            "no head_dim, which a qwen3 config must state",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"] * 2},
            "2 of 4 layers have a sliding window, and sliding_window is None",
        ),
        ({"model_type": "granite", "attention_multiplier": 0}, "attention_multiplier 0 is not above 0"),
        ({"model_type": "granite", "attention_multiplier": -0.5}, "attention_multiplier -0.5 is not above 0"),
        ({"model_type": "granite", "logits_scaling": 0.0}, "logits_scaling 0 is not above 0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps -1e-06 is below 0"),
        ({"rope_theta": 0}, "rope_theta 0 is not above 0: there would be no frequencies"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.0}},
            "rope_type 'linear' with factor 0.0, which is not above 0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}},
            "rope_type 'yarn' with original_max_position_embeddings 0, which is not above 0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "rope_theta": 1}},
            "rope_type 'yarn' with rope_theta 1, in whose logarithms it measures",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_slow": -1}},
            "rope_type 'yarn' with a beta_fast or beta_slow below 0",
        ),
        (
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 9, "short_factor": [0.0, 1.0]}},
            "rope_type 'longrope' with a number in short_factor that is not above 0",
        ),
        # What transformers takes for an absent number of positions differs between families.
        (
            {"max_position_embeddings": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type 'yarn' without a number for original_max_position_embeddings",
        ),
        (
            {"max_position_embeddings": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_type 'dynamic' without max_position_embeddings, which it depends on; state it",
        ),
        (
            {
                "max_position_embeddings": None,
                "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 64},
            },
            "rope_type 'longrope' without max_position_embeddings, which it depends on; state it",
        ),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert refusal(tmp_path, **changes) == [message]


def test_positions_that_yarn_does_not_need(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    stated = read_architecture(write_config(tmp_path, rope_scaling=yarn)).rope
    assert read_architecture(write_config(tmp_path, rope_scaling=yarn, max_position_embeddings=None)).rope == stated


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64),
        ({"model_type": "qwen2", "sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"] * 2}, 32),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28}, None),
        ({"model_type": "llama", "sliding_window": 64}, None),
    ],
    ids=["all layers", "upper layers", "by layer", "switched off", "above the last layer", "not read by this family"],
)
def test_the_window_that_layers_have(tmp_path: Path, changes: dict[str, Any], window: int | None) -> None:
    found = windows(read_architecture(write_config(tmp_path, **changes)))
    assert min((each for each in found if each is not None), default=None) == window


def test_all_problems_at_once(tmp_path: Path) -> None:
    assert refusal(tmp_path, model_type="qwen2", hidden_act="relu", mlp_bias=True, partial_rotary_factor=0.25) == [
        "hidden_act 'relu' is not supported; only 'silu' or 'swish' or 'gelu' or 'gelu_new' or 'gelu_pytorch_tanh'",
        "mlp_bias true is not supported",
        "partial_rotary_factor 0.25 is not supported; only 1.0",
    ]


def test_layers_have_windows_of_their_own(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    qwen2 = read_architecture(write_config(tmp_path, model_type="qwen2", sliding_window=32, layer_types=kinds))
    assert windows(qwen2) == [None, 32, None, 32]


def test_too_short_a_list_of_layer_types(tmp_path: Path) -> None:
    assert refusal(tmp_path, model_type="qwen2", layer_types=["full_attention"]) == [
        "layer_types is not a list with an entry for each of the 4 layers"
    ]


def test_the_registry_names_the_modules_of_families() -> None:
    modules = {path.stem for path in Path(families.__path__[0]).glob("*.py")} - {"__init__"}
    assert list(SUPPORTED) == sorted(modules)
    assert [family(name).model_type for name in SUPPORTED] == list(SUPPORTED)


@pytest.mark.parametrize("name", SUPPORTED)
def test_small_configs_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    """A family's small model is the net under it: it must not lack what the family's config requires."""
    found = read_architecture(save_config(name, tmp_path))
    if not family(name).multimodal:
        assert found.shape.model_type == name
    assert len(found.layers) == found.shape.num_layers == len(found.weights.layers)
    small = family(name).small_config
    assert language_model_config(dict(small)).keys() >= {"hidden_size", "num_hidden_layers", "num_attention_heads"}


@pytest.mark.parametrize("case", CASES)
def test_the_planner_counts_what_the_files_hold(case: str, tmp_path: Path) -> None:
    """All weights but biases, sinks and scales of layers: those of experts, shared ones and dense layers among them,
    and of norms. And the layers that have a window."""
    found = read_architecture(save_config(case, tmp_path))
    tensors = found.weights.hf_shapes()
    uncounted = {tensor for tensor in tensors if tensor.endswith(("bias", "sinks", "layer_scalar"))}
    weights = sum(math.prod(shape) for tensor, shape in tensors.items() if tensor not in uncounted)
    assert parameters(found.shape) == weights
    own = {layer: window for layer, window in enumerate(windows(found)) if window is not None}
    assert found.shape.windowed_layers == tuple(own)
    assert {found.shape.window} == set(own.values() or [None])


@pytest.mark.parametrize("name", SUPPORTED)
def test_keys_left_out_mean_what_transformers_means(name: str, tmp_path: Path) -> None:
    """Older files leave out what was the default then; a default of ours that differs trains another model."""
    from transformers import AutoConfig

    written, filled = tmp_path / "written", tmp_path / "filled"
    for directory in (written, filled):
        directory.mkdir()
    whole = json.loads((save_config(name, tmp_path) / "config.json").read_text())
    compared = 0
    for key in whole.keys() - {"model_type"}:
        config = {own: value for own, value in whole.items() if own != key}
        (written / "config.json").write_text(json.dumps(config))
        try:
            found = read_architecture(written)
        except ModelError:
            continue  # refused, by name
        AutoConfig.from_pretrained(written).save_pretrained(filled)
        assert shape_free_of_positions(found) == shape_free_of_positions(read_architecture(filled)), key
        compared += 1
    assert compared > 5


def shape_free_of_positions(architecture: Architecture) -> Architecture:
    """Return it without the number of positions, which only learned ones are bounded by."""
    shape = dataclasses.replace(architecture.shape, max_position_embeddings=0)
    return dataclasses.replace(architecture, shape=shape)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, [9, None, 9, None]),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, [9, None, None, None]),
        ({"use_sliding_window": False, "sliding_window": 9}, [None] * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
            [None, None, None, 9],
        ),
    ],
)
def test_windows_of_qwen2_moe_are_in_other_layers_than_qwen2s(
    changes: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    small = family("qwen2_moe").small_config
    found = read_architecture(write_config(tmp_path, **{**small, "model_type": "qwen2_moe", **changes}))
    assert [attention.window for attention in found.attentions] == windows
    assert found.shape.windowed_layers == tuple(layer for layer, window in enumerate(windows) if window is not None)


@pytest.mark.parametrize(
    ("used", "windows"),
    [(True, [9] * 4), (False, [None] * 4)],
)
def test_windows_of_qwen3_moe_are_in_all_layers_or_none(used: bool, windows: list[int | None], tmp_path: Path) -> None:
    """Seen to be in those from max_window_layers on, as in Qwen 3; the logits were other ones than transformers'."""
    changes = {"use_sliding_window": used, "sliding_window": 9, "max_window_layers": 2}
    small = family("qwen3_moe").small_config
    found = read_architecture(write_config(tmp_path, **{**small, "model_type": "qwen3_moe", **changes}))
    assert [attention.window for attention in found.attentions] == windows
    assert found.shape.windowed_layers == tuple(layer for layer, window in enumerate(windows) if window is not None)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("glm4_moe", {"n_group": 3}, "n_group 3: 8 experts are no such number of equal groups"),
        (
            "glm4_moe",
            {"topk_group": 1},
            "topk_group 1: the 3 experts of a token must fit into that many of 4 groups of 2",
        ),
        (
            "glm4_moe",
            {"n_shared_experts": 0},
            "n_shared_experts 0 is not supported: layers with experts have a shared one",
        ),
        (
            "ernie4_5_moe",
            {"num_experts": 9},
            "num_experts is another name of moe_num_experts in transformers; state moe_num_experts alone",
        ),
        (
            "ernie4_5_moe",
            {"moe_layer_start_index": 4},
            "moe_layer_start_index, moe_layer_end_index and moe_layer_interval leave no layer with experts",
        ),
        (
            "dots1",
            {"sliding_window": 9, "max_window_layers": 2},
            "sliding_window is not supported for model type dots1; set it to null, without sliding layers",
        ),
        (
            "dots1",
            {"num_local_experts": 16},
            "another number of experts than n_routed_experts is stated, 16; leave it out",
        ),
        (
            "minimax_m2",
            {"num_experts": 8},
            "num_experts is not supported for model type minimax_m2; state num_local_experts alone",
        ),
        (
            "minimax_m2",
            {"n_shared_experts": 1},
            "shared experts are not supported: transformers builds none for this model type",
        ),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias true is not supported"),
        (
            "deepseek_v3",
            {"num_key_value_heads": 2},
            "num_key_value_heads 2 is not supported: latents make keys and values for each of the 6 heads",
        ),
        (
            "deepseek_v2",
            {"norm_topk_prob": True},
            "norm_topk_prob True is not supported; transformers would compute as for False",
        ),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            "topk_method 'noaux_tc' is not supported; only 'greedy' or 'group_limited_greedy'",
        ),
        (
            "deepseek_v2",
            {"topk_group": 1, "num_experts_per_tok": 4},
            "topk_group 1: the 4 experts of a token must fit into that many of 4 groups of 2",
        ),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias true is not supported"),
        (
            "glm4_moe_lite",
            {"first_k_dense_replace": 2},
            "first_k_dense_replace 2: transformers reads mlp_layer_types alone in this family, by which dense layers "
            "are 0; leave it out, or let both say the same",
        ),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["dense", "moe", "sparse", "sparse"]},
            "mlp_layer_types has 'moe'; only dense and sparse are supported",
        ),
        ("deepseek_v3", {"head_dim": 4}, "head_dim 4 is not supported; only that of qk_rope_head_dim, 8, is"),
        (
            "deepseek_v3",
            {"scoring_func": "softmax"},
            "scoring_func 'softmax' is not supported; transformers would compute as for 'sigmoid'",
        ),
        (
            "deepseek_v3",
            {"moe_layer_freq": 2},
            "moe_layer_freq 2 is not supported; transformers would compute as for 1",
        ),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": "1"}},
            "mscale_all_dim '1' and factor 4.0 of a scaled RoPE are not both numbers, and the softmax scale is made of "
            "them",
        ),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config: quantized weights are not supported; use the unquantized model",
        ),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported for model type olmoe"),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv 0 is not supported"),
        ("olmoe", {"attention_bias": True}, "attention_bias true is not supported"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias false is not supported"),
        (
            "qwen2_moe",
            {"sliding_window": 9, "layer_types": ["sliding_attention"] * 4},
            "layer_types has sliding layers, and use_sliding_window is false",
        ),
        (
            "mixtral",
            {"router_jitter_noise": 0.1},
            "router_jitter_noise is not supported: a token's experts must not be random; set it to 0",
        ),
    ],
)
def test_refusals_of_models_with_experts(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, **{**family(name).small_config, "model_type": name, **changes}) == [message]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_cla": True}, "use_cla true is not supported"),
        (
            {"num_experts": 4, "num_experts_per_tok": 2},
            "num_experts 4 is not supported: transformers builds none for this model type",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "alpha": -1.0}},
            "the RoPE setting alpha -1.0 with head_dim 16: they must be above 0 and above 2",
        ),
    ],
)
def test_refusals_of_hunyuan(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    small = {**family("hunyuan_v1_dense").small_config, "model_type": "hunyuan_v1_dense"}
    assert refusal(tmp_path, **{**small, **changes}) == [message]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sliding_window": None},
            "sliding_window null without layer_types, by which transformers divides by 0; state both",
        ),
        ({"sliding_window_pattern": "LLLG"}, "sliding_window_pattern 'LLLG' is not a number"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern 0 is not above 0"),
    ],
)
def test_exaone4_without_layer_types(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The published configs have the pattern in letters, which transformers does not read, beside a list of layers."""
    small = {**family("exaone4").small_config, "model_type": "exaone4", **changes}
    assert refusal(tmp_path, **small) == [message]
    layers = ["full_attention"] * 4
    found = read_architecture(write_config(tmp_path, **{**small, "layer_types": layers}))
    assert [attention.window for attention in found.attentions] == [None] * 4
    assert {attention.rotary for attention in found.attentions} == {small["sliding_window"] is None}


def test_gemma3_with_images_caps_no_logits(tmp_path: Path) -> None:
    """Seen to cap them; transformers' class with an image tower does not."""
    small: dict[str, Any] = dict(family("gemma3").small_config)
    text = {**small["text_config"], "vocab_size": 97, "max_position_embeddings": 128, "final_logit_softcapping": 0.5}
    assert refusal(tmp_path, **{**small, "model_type": "gemma3", "text_config": text}) == [
        "final_logit_softcapping is not supported beside images: transformers caps the text model's logits alone"
    ]


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_attention_to_later_tokens_is_refused_in_a_multimodal_config(where: str, tmp_path: Path) -> None:
    small: dict[str, Any] = dict(family("mistral3").small_config)
    text = {**small["text_config"], "vocab_size": 97, "max_position_embeddings": 128}
    config = {**small, "model_type": "mistral3", "text_config": text}
    (config if where == "top" else text)["is_causal"] = False
    assert refusal(tmp_path, **config) == ["is_causal false is not supported"]


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("name", ["gemma3_text", "olmo3"])
def test_a_ramp_of_yarn_that_transformers_rounds_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    """Seen not to round it, other frequencies than transformers', which looks for the key in another place."""
    small: dict[str, Any] = dict(family(name).small_config)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
    ropes = {**small["rope_parameters"], kind: yarn}
    assert refusal(tmp_path, **{**small, "model_type": name, "rope_parameters": ropes}) == [
        f"truncate false in rope_parameters.{kind} is not supported; transformers ignores it"
    ]


def test_ministral3_counts_from_the_positions_among_its_rope_settings(tmp_path: Path) -> None:
    """Seen to take those at the top, which transformers does for some kinds of scaling alone."""
    small: dict[str, Any] = dict(family("ministral3").small_config)
    rope = {"rope_type": "default", "llama_4_scaling_beta": 0.2, "original_max_position_embeddings": 8}
    config = {**small, "model_type": "ministral3", "rope_parameters": rope, "original_max_position_embeddings": 48}
    scales = {attention.query_scale for attention in read_architecture(write_config(tmp_path, **config)).attentions}
    assert {scale.every for scale in scales if scale is not None} == {8}


def test_two_names_of_a_size_of_gpt2_must_agree(tmp_path: Path) -> None:
    """Seen to take n_head, where transformers takes the other: other attention over the same weights."""
    small = {**family("gpt2").small_config, "model_type": "gpt2"}
    assert refusal(tmp_path, **small, n_head=3) == ["n_head 3 and num_attention_heads 6 mean the same, and differ"]
    assert read_architecture(write_config(tmp_path, **small, n_head=6)).shape.num_attention_heads == 6


def test_olmo3_takes_no_earlier_name_of_a_scaling(tmp_path: Path) -> None:
    """Seen to scale, where transformers takes rope_type alone."""
    small = {key: value for key, value in family("olmo3").small_config.items() if key != "rope_parameters"}
    scaling = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert refusal(tmp_path, **{**small, "model_type": "olmo3", **scaling}) == [
        "rope_scaling with type: transformers reads rope_type alone in this family, and would not scale"
    ]
