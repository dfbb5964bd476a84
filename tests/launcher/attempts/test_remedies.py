"""What to set before the next try, from the run's own settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launcher.attempts.remedies import remedies
from launcher.contract.rank_error import RankError
from launcher.contract.rundir import COMPLETE
from launcher.contract.spec import CheckpointSpec, ResourcesSpec, RunSpec, TrainSpec

SPEC = RunSpec(
    train=TrainSpec(micro_batch_size=6),
    resources=ResourcesSpec(time="1-00", exclude="n1"),
    checkpoint=CheckpointSpec(every=100, keep_last=3),
)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("out_of_memory", ["train.micro_batch_size=3", "train.recompute=full", "resources.nodes=None"]),
        ("timeout", ["resources.time=48:00:00", "checkpoint.every=50"]),
        ("disk_full", ["checkpoint.keep_last=1", "run_root=None"]),
        ("bad_node", ["resources.exclude=n1,n7,n8"]),
        ("user_code", []),
        ("done", []),
    ],
)
def test_by_cause(cause: str, words: list[str]) -> None:
    found = remedies(SPEC, {"cause": cause, "avoid": ["n7", "n8"]}, None)
    assert [f"{remedy.key}={remedy.value}" for remedy in found] == words


def test_nothing_is_named_that_is_set_already() -> None:
    least = dataclasses.replace(SPEC, train=TrainSpec(micro_batch_size=1, recompute="full"))
    assert [remedy.key for remedy in remedies(least, {"cause": "out_of_memory"}, None)] == ["resources.nodes"]


def test_all_layers_are_computed_again_where_some_were_not_enough() -> None:
    some = dataclasses.replace(SPEC, train=TrainSpec(micro_batch_size=1, recompute="full", recompute_layers=3))
    found = remedies(some, {"cause": "out_of_memory"}, None)
    assert [(remedy.key, remedy.value) for remedy in found][:1] == [("train.recompute_layers", "null")]


def test_graphs_are_given_up_before_anything_is_computed_again() -> None:
    """A config with both is refused."""
    always = dataclasses.replace(SPEC, train=TrainSpec(micro_batch_size=1, cuda_graphs="always"))
    found = remedies(always, {"cause": "out_of_memory"}, None)
    assert [remedy.key for remedy in found] == ["train.cuda_graphs", "resources.nodes"]
    train = dataclasses.replace(always.train, cuda_graphs="never")
    found = remedies(dataclasses.replace(always, train=train), {"cause": "out_of_memory"}, None)
    assert [remedy.key for remedy in found] == ["train.recompute", "resources.nodes"]


def test_a_damaged_checkpoint_has_another_beside_it(tmp_path: Path) -> None:
    error = RankError(kinds=("CheckpointError", "LauncherError"), message="damaged")
    given = tmp_path / "step-00000002"
    spec = dataclasses.replace(SPEC, checkpoint=CheckpointSpec(resume_from=str(given)))
    for path in (given, tmp_path / "step-00000001"):
        path.mkdir()
        (path / COMPLETE).touch()
    (found,) = remedies(spec, {"cause": "unknown"}, error)
    assert found.value == str(tmp_path / "step-00000001")
    (tmp_path / "step-00000001" / COMPLETE).unlink()
    (found,) = remedies(spec, {"cause": "unknown"}, error)
    assert found.value == "null"
