"""Whether there is anything left to train behind a checkpoint."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.spec import EarlyStoppingSpec, RunSpec, TrainSpec
from sft.checkpoint.contents import TrainerState
from sft.checkpoint.files import seal
from sft.training.trainer import _nothing_to_do

SPEC = RunSpec(train=TrainSpec(early_stopping=EarlyStoppingSpec(patience=2)))


def sealed(folder: Path, waited: int) -> Path:
    """A checkpoint after step 4, whose run waited that long for an improvement."""
    checkpoint = folder / "step-00000004"
    (checkpoint / "sharded").mkdir(parents=True)
    evaluation = {"best": 1.0, "best_step": 2, "waited": waited}
    state = TrainerState(lightning={"callbacks": {"evaluation": evaluation}}, topology={}, data_key={})
    (checkpoint / "trainer.json").write_text(state.to_json())
    seal(checkpoint, {})
    return checkpoint


def test_early_stopping_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    assert _nothing_to_do(SPEC, None, 9) is None
    assert _nothing_to_do(SPEC, sealed(tmp_path / "a", 1), 9) is None
    assert _nothing_to_do(SPEC, sealed(tmp_path / "b", 2), 9) == "training ended early after step 4"
    assert _nothing_to_do(SPEC, sealed(tmp_path / "c", 0), 4) == "all 4 steps are done"


def test_a_damaged_file_of_the_right_size_is_left_to_the_checksums(tmp_path: Path) -> None:
    """Loading compares them, and takes an older checkpoint where there is one."""
    checkpoint = sealed(tmp_path, 2)
    file = checkpoint / "trainer.json"
    file.write_text(file.read_text().replace("{", "[", 1))
    assert _nothing_to_do(SPEC, checkpoint, 9) is None
