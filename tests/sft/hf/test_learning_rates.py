"""Learning rates by Hugging Face name, as multiples for the parameters that hold these tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract.spec import LoraSpec, OptimizerSpec
from sft.hf.learning_rates import rate_groups, rate_problems, rates
from sft.models.registry import read_architecture
from tests.sft.hf_cases import save_config
from tests.sft.models.test_weight_map import architecture

FULL = LoraSpec()
LORA = LoraSpec(rank=2, targets=["q_proj", "v_proj"], dora=True)


def optimizer(**settings: object) -> OptimizerSpec:
    return OptimizerSpec(lr=1e-3, **settings)  # type: ignore[arg-type]


def multipliers(settings: OptimizerSpec, lora: LoraSpec) -> dict[str, float]:
    return {name: rate.multiplier for name, rate in rates(settings, lora, architecture()).items()}


def test_the_first_pattern_that_matches_counts() -> None:
    by_name = {"*.layers.1.*norm*": "5e-4", "*norm*": "1e-2", "*.embed_tokens.*": "0"}
    found = multipliers(optimizer(lr_by_name=by_name), FULL)
    assert found == {
        "embedding.word_embeddings.weight": 0.0,
        "decoder.layers.0.input_layernorm.weight": pytest.approx(10),
        "decoder.layers.0.pre_mlp_layernorm.weight": pytest.approx(10),
        "decoder.layers.1.input_layernorm.weight": pytest.approx(0.5),
        "decoder.layers.1.pre_mlp_layernorm.weight": pytest.approx(0.5),
        "decoder.final_layernorm.weight": pytest.approx(10),
    }


def test_loraplus_is_for_b_and_magnitudes() -> None:
    found = multipliers(optimizer(loraplus_ratio=16.0), LORA)
    assert set(found.values()) == {16.0}
    assert {name.rpartition(".lora.")[2] for name in found} == {
        "q_proj.lora_B.0",
        "q_proj.magnitude.0",
        "v_proj.lora_B.0",
        "v_proj.magnitude.0",
    }


def test_routers_learn_at_the_rate_of_a_or_by_their_name() -> None:
    """They are whole matrices, and LoRA+ is about the two of an adapter."""
    lora, router = LoraSpec(rank=2, targets=["q_proj"], router=True), "decoder.layers.1.mlp.router.weight"
    model = architecture("qwen3_moe")
    assert router not in rates(optimizer(loraplus_ratio=16.0), lora, model)
    named = rates(optimizer(lr_by_name={"*.mlp.gate.weight": "3e-3"}), lora, model)
    assert {name: rate.multiplier for name, rate in named.items()} == {
        f"decoder.layers.{layer}.mlp.router.weight": pytest.approx(3e-3 / optimizer().lr) for layer in range(2)
    }


def test_a_bias_that_is_never_trained_has_no_rate(tmp_path: Path) -> None:
    model = read_architecture(save_config("glm4_moe", tmp_path))
    (problem,) = rate_problems(optimizer(lr_by_name={"*e_score_correction_bias": "0"}), FULL, model)
    assert problem.startswith("train.optimizer.lr_by_name: '*e_score_correction_bias' matches no trained parameter")


def test_patterns_name_adapters_and_go_before_loraplus() -> None:
    settings = optimizer(loraplus_ratio=16.0, lr_by_name={"*.v_proj.lora_B.*": "2e-3"})
    found = multipliers(settings, LORA)
    assert {value for name, value in found.items() if "v_proj.lora_B" in name} == {2.0}
    assert {value for name, value in found.items() if "q_proj.lora_B" in name} == {16.0}
    assert not rate_problems(settings, LORA, architecture())


def test_groups_are_the_settings_and_not_their_rates() -> None:
    """A checkpoint knows parameters by them, and a resumed run may have other rates."""
    settings, other = (
        optimizer(loraplus_ratio=ratio, lr_by_name={"*.v_proj.lora_B.*": rate})
        for ratio, rate in ((16.0, "2e-3"), (4.0, "1e-3"))
    )
    groups = [
        {name: rate.group for name, rate in rates(each, LORA, architecture()).items()} for each in (settings, other)
    ]
    assert groups[0] == groups[1]
    assert set(groups[0].values()) == {0, 1}
    assert rate_groups(settings) == rate_groups(other) == ["LoRA+", "*.v_proj.lora_B.*"]


@pytest.mark.parametrize(
    ("pattern", "lora", "message"),
    [
        ("*.q_prj.*", FULL, "'*.q_prj.*' matches no trained parameter; their names are like model.embed_tokens.weight"),
        (
            "*.embed_tokens.*",
            LORA,
            "matches no trained parameter; their names are like model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        (
            "*.q_proj.weight",
            FULL,
            "one matrix here has one learning rate, and it holds model.layers.0.self_attn.q_proj.weight 2e-3, "
            "model.layers.0.self_attn.k_proj.weight lr, model.layers.0.self_attn.v_proj.weight lr; name all of them",
        ),
    ],
)
def test_patterns_that_do_nothing_or_cannot_be_are_refused(pattern: str, lora: LoraSpec, message: str) -> None:
    (problem,) = rate_problems(optimizer(lr_by_name={pattern: "2e-3"}), lora, architecture())
    assert problem.startswith("train.optimizer.lr_by_name: ") and message in problem


def test_a_pattern_behind_one_that_matches_all_of_its_parameters_is_refused() -> None:
    """It was ignored, and its parameters learnt at the other rate."""
    narrow, wide = ("*.lora_B.*", "1e-3"), ("*", "1e-4")
    assert rate_problems(optimizer(lr_by_name=dict([narrow, wide])), LORA, architecture()) == []
    (problem,) = rate_problems(optimizer(lr_by_name=dict([wide, narrow])), LORA, architecture())
    assert problem.startswith("train.optimizer.lr_by_name: '*.lora_B.*' stands behind patterns that match all of its")


def test_rates_that_leave_nothing_to_train_are_refused() -> None:
    (problem,) = rate_problems(optimizer(lr_by_name={"*": "0"}), FULL, architecture())
    assert problem == "train.optimizer.lr_by_name: every trained parameter has rate 0, so that nothing would be trained"
    assert rate_problems(optimizer(lr_by_name={"*.lora_A.*": "0"}), LORA, architecture()) == []
