"""What NeMo 2's classes do not have is refused by name before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract.errors import ModelError
from sft.models.registry import read_architecture
from sft.nemo.context_writer import model_object
from tests.sft.hf_cases import save_config


@pytest.mark.parametrize(
    ("case", "absent"),
    [
        ("llama_yarn_stated", "YaRN positions"),
        ("llama_dynamic_rope", "positions that depend on the length of a batch"),
        ("llama_biased_attention", "biases on its attention's output or its MLP"),
        ("llama_biased_mlp", "biases on its attention's output or its MLP"),
        ("mistral3", "parts beside the language model"),
    ],
)
def test_a_model_that_nemo_has_no_class_for(case: str, absent: str, tmp_path: Path) -> None:
    architecture = read_architecture(save_config(case, tmp_path))
    kind = architecture.shape.model_type
    with pytest.raises(ModelError) as caught:
        model_object(architecture, "bfloat16")
    assert str(caught.value) == f"a {kind} model with {absent} cannot be written for NeMo 2, whose classes have none"


def test_gelu_in_place_of_silu(tmp_path: Path) -> None:
    architecture = read_architecture(save_config("llama", tmp_path, hidden_act="gelu"))
    with pytest.raises(ModelError, match="a llama model with an activation other than SiLU cannot be written"):
        model_object(architecture, "bfloat16")
