"""What of a config.json is recorded as what the model computes, and how two records differ."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from sft.models.numerics import Values, differences, numerics
from sft.models.registry import read_architecture
from tests.sft.hf_cases import CASES, save_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None}


def record(case: str, directory: Path, **more: object) -> Values:
    directory.mkdir(exist_ok=True)
    values = json.loads((save_config(case, directory) / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **more}))
    return numerics(read_architecture(directory))


@pytest.mark.parametrize(
    ("case", "changes", "differs"),
    [
        ("llama", {"rope_theta": 1e4, "rope_parameters": None}, "rope.theta was 500000.0, is 10000.0"),
        ("llama", {"rope_parameters": YARN}, "rope.factor was 1.0, is 4.0"),
        ("llama", {"rms_norm_eps": 1e-3}, "layernorm_epsilon was 1e-05, is 0.001"),
        ("llama", {"tie_word_embeddings": True}, "tied_embeddings was false, is true"),
        ("qwen2", WINDOW, r"attention.window\[1\] was unset, is 16"),
        ("gemma2", {"final_logit_softcapping": 5.0}, "logits_softcap was 1.5, is 5.0"),
        ("gemma2", {"attn_logit_softcapping": None}, "attention.score_softcap was 0.7, is unset"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "attention.softmax_scale was .*, is 0.1"),
        ("granite", {"logits_scaling": 1.0}, "logits_scaling was .*, is 1.0"),
        ("granite", {"residual_multiplier": 1.0}, "layer.residual_multiplier was .*, is 1.0"),
        ("gpt2", {"activation_function": "gelu"}, 'mlp.activation was "gelu_tanh", is "gelu"'),
        ("mixtral", {"num_experts_per_tok": 1}, "mlp.chosen was 2, is 1"),
    ],
)
def test_numbers_of_a_config_that_weights_do_not_show(
    case: str, changes: dict[str, object], differs: str, tmp_path: Path
) -> None:
    """Weights of the same shapes load into each of these."""
    before, now = record(case, tmp_path / "before"), record(case, tmp_path / "now", **changes)
    assert json.loads(json.dumps(before)) == before
    found = differences(before, now)
    assert any(re.fullmatch(differs, text) for text in found), found


def test_what_changes_no_number_is_not_recorded(tmp_path: Path) -> None:
    changes = {"max_position_embeddings": 4096, "torch_dtype": "bfloat16", "dtype": "bfloat16", "use_cache": False}
    assert record("llama", tmp_path / "now", **changes) == record("llama", tmp_path / "before")


def test_the_last_digit_of_a_logarithm_may_differ(tmp_path: Path) -> None:
    """Nodes of one run may have other mathematical libraries; 1 is the default, which a record leaves out."""
    architecture = read_architecture(save_config("llama", tmp_path))
    for scaling in (1.0, 0.1 * 3):
        one, other = (
            dataclasses.replace(architecture, logits_scaling=number)
            for number in (scaling, math.nextafter(scaling, 2.0))
        )
        assert numerics(one) == numerics(other)


@pytest.mark.parametrize("case", CASES)
def test_every_covered_model_has_a_record(case: str, tmp_path: Path) -> None:
    values = numerics(read_architecture(save_config(case, tmp_path)))
    assert json.loads(json.dumps(values)) == values
    assert differences(values, values) == []
