"""Every family trains the same model: losses and every gradient equal plain PyTorch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.models.registry import SUPPORTED, read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.parity.test_grid import assert_gradients_equal
from tests.sft.hf_cases import CASES, OF_TEXT, ON_STAGES, save_hf_model
from tests.tiny_model import VOCAB_SIZE, make_chat_rows, make_tokenizer, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 2
RATE = {"lr": 1e-4}
"""At a larger rate the second step differs by how AdamW treats rounding near 0."""
SHORT = {**RATE, "global_batch_size": 4}
"""Of the grid of all families, whose layouts have at most two ranks with data of their own."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
"""What two tensor parallel ranks divide."""
MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v2_lite": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v3_no_query_latent": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm4_moe_lite_alternating": {"num_key_value_heads": 4},
    "gemma_untied": {"num_key_value_heads": 2},
    **{
        case: {"num_global_key_value_heads": 4}
        for case in CASES
        if case.startswith("gemma4") and case != "gemma4_text_one_key_head"
    },
    "phi3_longrope": {
        "original_max_position_embeddings": 384,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0],
            "long_factor": [1.0, 4.0, 8.0, 12.0, 16.0, 20.0],
        },
    },
}
"""Cases with a size of their own."""
VARIANTS = (
    "gemma4_text_experts",
    "gemma4_text_one_key_head",
    "gpt2_untied",
    "llama_biased",
    "llama_llama3_rope_other_numbers",
    "phi3_longrope",
    "phi3_partial_rope",
    "qwen2_yarn",
)
"""Variants that are trained by default beside the families' own small models."""
Layout = tuple[int, dict[str, Any], dict[str, Any]]
LAYOUTS: dict[str, Layout] = {
    "tp2_pp2_plain": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}, {"kernels": "plain"}),
    "tp2_sp_fused_packed": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"kernels": "fused", "packing": True},
    ),
}
FURTHER_LAYOUTS: dict[str, Layout] = {
    "pp2_vpp2_dp2": (4, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {"packing": True}),
    "cp2_tp2_sp": (
        4,
        {"context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        {"packing": True, "kernels": "fused"},
    ),
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


def family_model(directory: Path, case: str, **more: Any) -> Path:
    """Write the model of a case of tests.sft.hf_cases, in the sizes above, with a tokenizer."""
    save_hf_model(case, directory, **{**SIZES, **MORE.get(case, {}), **more})
    make_tokenizer().save_pretrained(directory)
    return directory


def _cells() -> list[Any]:
    """Every case under every layout. By default all run under the fused one, and most distinct families under both."""
    by_default = {(case, "tp2_sp_fused_packed") for case in (*OF_TEXT, *VARIANTS)}
    by_default |= {(family, "tp2_pp2_plain") for family in ON_STAGES}
    cells = [(case, layout) for case in CASES for layout in LAYOUTS]
    return [cell if cell in by_default else pytest.param(*cell, marks=pytest.mark.slow) for cell in cells]


@pytest.mark.parametrize(("case", "layout"), _cells())
def test_every_gradient_follows_reference(case: str, layout: str, tmp_path: Path, chat: Path) -> None:
    """Every family of the registry, with plain and with fused kernels: a new family is found without being named."""
    expect_reference(case, LAYOUTS[layout], tmp_path, chat)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FURTHER_LAYOUTS)
@pytest.mark.parametrize("case", [*SUPPORTED, *VARIANTS])
def test_further_layouts(case: str, layout: str, tmp_path: Path, chat: Path) -> None:
    """Virtual stages, data parallel, and rows that ranks share: what they do to a layer, Llama shows by default."""
    expect_reference(case, FURTHER_LAYOUTS[layout], tmp_path, chat)


def expect_reference(case: str, layout: Layout, root: Path, chat: Path) -> None:
    ranks, topology, settings = layout
    model = family_model(root / "model", case)
    expected = reference_curve(root / "reference", model, chat, steps=STEPS, **SHORT)
    paths = make_run(root, model, chat, ranks=ranks, topology=topology, max_steps=STEPS, **SHORT, **settings)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=2e-5)
    assert_gradients_equal(join(by_rank, read_architecture(model))[0], expected.gradients[0])
