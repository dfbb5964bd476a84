"""Settings that a model cannot follow are refused before a rank starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launcher.contract.errors import ModelError
from launcher.contract.spec import DataSpec, EvaluationSpec, LoraSpec, ModelSpec, RunSpec, TopologySpec
from sft.hf.checks import check_model_settings
from sft.models.registry import read_architecture
from tests.sft.hf_cases import save_config
from tests.sft.models.test_architecture import CONFIG

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 100},
        {
            "model_type": "phi3",
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 100,
            "max_position_embeddings": 1000,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_rows_beyond_which_rope_depends_on_the_batch(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
    architecture = read_architecture(tmp_path)
    spec = RunSpec(data=DataSpec(seq_length=100))
    check_model_settings(spec, architecture)

    with pytest.raises(ModelError) as caught:
        check_model_settings(RunSpec(data=DataSpec(seq_length=101)), architecture)
    assert str(caught.value) == (
        "data.seq_length 101: beyond 100 tokens this model's RoPE depends on the length of the batch (rope_type "
        "dynamic or longrope), which is not supported; keep to at most 100"
    )
    answering = dataclasses.replace(spec, evaluation=EvaluationSpec(prompts="prompts.jsonl", max_new_tokens=8))
    with pytest.raises(ModelError, match=r"data\.seq_length 100 \+ evaluation\.max_new_tokens 8: beyond 100 tokens"):
        check_model_settings(answering, architecture)


def test_key_heads_that_are_normed_together_are_not_shared(tmp_path: Path) -> None:
    architecture = read_architecture(save_config("olmo2", tmp_path))
    check_model_settings(RunSpec(topology=TopologySpec(tensor_parallel=3)), architecture)
    with pytest.raises(ModelError) as caught:
        check_model_settings(RunSpec(topology=TopologySpec(tensor_parallel=6)), architecture)
    assert str(caught.value) == (
        "topology.tensor_parallel 6: this model norms its 3 key heads together, which more ranks than heads cannot; "
        "set it to at most 3"
    )


def test_a_pipeline_stage_without_a_target_is_refused(tmp_path: Path) -> None:
    """Of four layers only the last has full attention, and with it q_proj."""
    architecture = read_architecture(save_config("qwen3_5_text", tmp_path))

    def spec(*targets: str, **topology: int) -> RunSpec:
        lora = LoraSpec(rank=2, targets=list(targets))
        return RunSpec(model=ModelSpec(lora=lora), topology=TopologySpec(**topology))

    check_model_settings(spec("q_proj"), architecture)
    check_model_settings(spec("q_proj", "out_proj", pipeline_parallel=2), architecture)
    check_model_settings(spec("down_proj", pipeline_parallel=4), architecture)
    with pytest.raises(ModelError) as caught:
        check_model_settings(spec("q_proj", pipeline_parallel=2), architecture)
    assert str(caught.value).startswith(
        "model.lora.targets: none of q_proj is in the layers of pipeline stage 0 of 2, which would train nothing; add "
        "a layer that it has (in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj, gate_proj, up_proj, down_proj, "
    )
