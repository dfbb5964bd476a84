"""Where a run goes on from, and whether there is anything left to train behind it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from launcher.contract.errors import CheckpointError, ConfigError
from launcher.contract.rundir import COMPLETE, RunPaths
from launcher.contract.spec import EarlyStoppingSpec, RunSpec, TrainSpec
from sft.checkpoint.contents import TrainerState
from sft.checkpoint.files import seal
from sft.training.resume_point import nothing_to_do, resume_point


@contextmanager
def nowarn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def left_to_do(root: Path, waited: int, max_steps: int) -> str | None:
    paths = RunPaths(root)
    return nothing_to_do(SPEC, paths, sealed(paths.checkpoints, waited), max_steps)


def test_early_stopping_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    assert nothing_to_do(SPEC, RunPaths(tmp_path), None, 9) is None
    assert left_to_do(tmp_path / "a", 1, 9) is None
    assert left_to_do(tmp_path / "b", 2, 9) == "training ended early after step 4"
    assert left_to_do(tmp_path / "c", 0, 4) == "all 4 steps are done"
    with pytest.raises(ConfigError, match=r"train\.max_steps -2 in .* is below 1: the file is damaged"):
        left_to_do(tmp_path / "d", 0, -2)


def test_a_run_that_would_train_nothing_of_another_s_checkpoint_is_refused(tmp_path: Path) -> None:
    other = sealed(tmp_path / "other", 0)
    assert nothing_to_do(SPEC, RunPaths(tmp_path / "run"), other, 9) is None
    with pytest.raises(ConfigError, match=r"all 4 steps are done, so that this run would train nothing"):
        nothing_to_do(SPEC, RunPaths(tmp_path / "run"), other, 4)


def test_a_damaged_file_of_the_right_size_is_left_to_the_checksums(tmp_path: Path) -> None:
    """Loading compares them, and takes an older checkpoint where there is one."""
    paths = RunPaths(tmp_path)
    checkpoint = sealed(paths.checkpoints, 2)
    file = checkpoint / "trainer.json"
    file.write_text(file.read_text().replace("{", "[", 1))
    assert nothing_to_do(SPEC, paths, checkpoint, 9) is None


@pytest.mark.parametrize("marker", ["", "{}", None])
def test_damage_of_every_checkpoint_starts_nothing_anew(tmp_path: Path, marker: str | None) -> None:
    """A run was seen to begin again at step 0, with warnings and exit code 0."""
    paths = RunPaths(tmp_path)
    checkpoint = sealed(paths.checkpoints, 0)
    older = checkpoint.rename(paths.checkpoint(2))
    checkpoint = sealed(paths.checkpoints, 0)
    assert resume_point(SPEC, paths) == checkpoint
    for folder, left in ((checkpoint, older), (older, None)):
        if marker is None:
            (folder / COMPLETE).unlink()
        else:
            (folder / COMPLETE).write_text(marker)
        if left is not None:
            with pytest.warns(UserWarning, match="is damaged and skipped") if marker is not None else nullcontext():
                assert resume_point(SPEC, paths) == left
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be used.*Remove them"), nowarn():
        resume_point(SPEC, paths)
