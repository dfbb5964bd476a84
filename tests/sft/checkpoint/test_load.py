"""What is refused before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.contract.errors import CheckpointError, ConfigError
from launcher.contract.spec import LoraSpec
from sft.checkpoint import load
from sft.checkpoint.contents import TrainerState
from sft.checkpoint.same_model import check_base_weights, check_model
from sft.checkpoint.same_run import adapter_problems, differences
from sft.hf.checks import trained_adapters
from sft.models.numerics import numerics
from sft.models.registry import read_architecture
from tests.sft.hf_cases import save_config


@pytest.mark.parametrize(
    ("writer", "reader", "refused"),
    [
        ("0.19.2", "0.18.2", True),
        ("0.19.2+1a2b3c", "0.16.1", True),
        ("0.19.2", "0.19.0", False),
        ("0.16.1", "0.19.2", False),
        ("0.18.2", "0.16.1", False),
    ],
)
def test_checkpoints_of_other_versions(
    writer: str, reader: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with the real ones in tests/parity/test_other_megatron.py."""
    state = TrainerState(lightning={}, topology={}, data_key={}, versions={"megatron_core": writer})
    monkeypatch.setattr(load, "megatron_version", reader)
    if not refused:
        load._check_version(Path("step-00000002"), state)
        return
    with pytest.raises(CheckpointError, match=rf"step-00000002 was written with Megatron-core {writer.split('+')[0]}"):
        load._check_version(Path("step-00000002"), state)


@pytest.mark.parametrize(
    ("now", "differs"),
    [
        (LoraSpec(rank=4, alpha=800), "model.lora.alpha as a scale was 2.0, is 200.0"),
        (LoraSpec(rank=4, alpha=8, rslora=True), "model.lora.alpha as a scale was 2.0, is 4.0"),
        (LoraSpec(rank=2, alpha=4), "model.lora.rank was 4, is 2"),
        (LoraSpec(rank=4, alpha=8, dora=True), "model.lora.dora was false, is true"),
        (LoraSpec(rank=4, alpha=8, targets=["q_proj"]), r'model.lora.targets was \["q_proj", .*, is \["q_proj"\]'),
        (LoraSpec(), "model.lora.rank was 4, is unset"),
    ],
)
def test_other_adapters_than_those_of_a_checkpoint_are_refused(now: LoraSpec, differs: str, tmp_path: Path) -> None:
    """Seen to go on: with a scale a hundred times as large, and without the adapters that were no targets any more."""
    architecture = read_architecture(save_config("llama", tmp_path))
    adapters = trained_adapters(LoraSpec(rank=4, alpha=8), architecture)
    written = TrainerState(lightning={}, topology={}, data_key={}, adapters=adapters).to_json()
    state, source = TrainerState.from_json(written), Path("step-00000002")
    same = LoraSpec(rank=4, alpha=8, targets=[*adapters["model.lora.targets"]], dropout=0.1)  # type: ignore[misc]
    assert adapter_problems(source, state, trained_adapters(same, architecture)) == []
    (said,) = adapter_problems(source, state, trained_adapters(now, architecture))
    assert re.match(f"step-00000002 was written by a run that trained something else: {differs}", said)
    earlier = TrainerState.from_json(TrainerState(lightning={}, topology={}, data_key={}).to_json())
    assert adapter_problems(source, earlier, trained_adapters(now, architecture)) == []


def test_another_model_than_that_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """In a run of tests/parity/test_resume.py, too; a checkpoint that records no model is loaded as before."""
    llama, qwen2 = (numerics(read_architecture(save_config(case, tmp_path / case))) for case in ("llama", "qwen2"))
    state = TrainerState(lightning={}, topology={}, data_key={}, model=llama)
    state, source = TrainerState.from_json(state.to_json()), Path("step-00000002")
    check_model(source, state, llama)
    with pytest.raises(ConfigError, match="step-00000002 was written by a run of another model: "):
        check_model(source, state, qwen2)
    earlier = TrainerState.from_json(TrainerState(lightning={}, topology={}, data_key={}).to_json())
    check_model(source, earlier, qwen2)


def test_adapters_of_other_weights_are_refused() -> None:
    """By an export, too (tests/parity/test_lora.py)."""
    written = TrainerState(lightning={}, topology={}, data_key={}, base_weights="abc").to_json()
    state, source = TrainerState.from_json(written), Path("step-00000002")
    check_base_weights(source, state, "abc")
    with pytest.raises(ConfigError, match="step-00000002 holds adapters that were trained on other weights"):
        check_base_weights(source, state, "xyz")
    earlier = TrainerState.from_json(TrainerState(lightning={}, topology={}, data_key={}).to_json())
    check_base_weights(source, earlier, "xyz")


def test_what_decides_on_the_tokens_is_named_where_they_differ() -> None:
    """data.train was named where data.seq_length had changed."""
    before = {"data.train": f"sha256:{'a' * 64}", "train.seed": 1}
    said = differences(before, {**before, "data.train": f"sha256:{'b' * 64}"})
    assert said.startswith("data.train was sha256:aaaaaaaaaaaa, is sha256:bbbbbbbbbbbb (the files, or what decides on")
    assert "data.seq_length, data.loss_on" in said
    assert differences(before, {**before, "train.seed": 2}) == "train.seed was 1, is 2"
