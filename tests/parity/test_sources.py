"""Training on several sources with weights: the plain loop's losses, the same on resume, and no other mixture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.rundir import RunPaths, read_lines
from launcher.contract.spec import SourceSpec
from tests.parity.runs import curve, make_run, reference_curve, refused, run_training
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

UNITS: dict[str, dict[str, Any]] = {
    "examples": {"every": 5},
    "packed_tokens": {"every": 9, "packing": True, "global_batch_unit": "tokens", "global_batch_size": 512},
}
"""The checkpoint is in the second epoch, which takes other examples than the first."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("material")
    make_tiny_model(root / "model")
    write_jsonl(root / "chat.jsonl", make_chat_rows(20, seed=3))
    questions = [
        {"question": row["messages"][-2]["content"], "completion": row["messages"][-1]["content"]}
        for row in make_chat_rows(7, seed=5)
    ]
    write_jsonl(root / "pairs.jsonl", questions)
    return root


def sources_of(material: Path, weight: float = 1.5) -> dict[str, SourceSpec]:
    return {
        "chat": SourceSpec(files=[str(material / "chat.jsonl")]),
        "pairs": SourceSpec(files=[str(material / "pairs.jsonl")], weight=weight, columns={"prompt": "question"}),
    }


def mixed_run(root: Path, material: Path, ranks: int, weight: float = 1.5, **settings: Any) -> RunPaths:
    """A run of two epochs over both sources."""
    settings = {"max_steps": None, "epochs": 2, "keep_last": 9, **settings}
    files = material / "model", material / "chat.jsonl"
    return make_run(root, *files, ranks=ranks, sources=sources_of(material, weight), **settings)


@pytest.fixture(scope="module", params=UNITS)
def full(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, material: Path
) -> tuple[str, RunPaths]:
    """Two epochs at dp 2."""
    paths = mixed_run(tmp_path_factory.mktemp("full"), material, 2, **UNITS[request.param])
    run_training(paths, 2)
    return request.param, paths


def continued(root: Path, material: Path, full: tuple[str, RunPaths], ranks: int, **settings: Any) -> RunPaths:
    """A run directory as the full run left it at its first checkpoint."""
    unit, before = full
    step = UNITS[unit]["every"]
    paths = mixed_run(root, material, ranks, **{**UNITS[unit], **settings})
    shutil.copytree(before.checkpoint(step), paths.checkpoint(step))
    paths.metrics.write_text("".join(before.metrics.read_text().splitlines(keepends=True)[:step]))
    return paths


def consumed(paths: RunPaths) -> list[int]:
    return [record["consumed_examples"] for record in read_lines(paths.metrics)]


def test_two_ranks_train_what_the_plain_loop_does(tmp_path: Path, material: Path, full: tuple[str, RunPaths]) -> None:
    """20 + 1.5 x 7, so 31 examples an epoch."""
    unit, paths = full
    losses, _ = curve(paths)
    files = material / "model", material / "chat.jsonl"
    settings = {"sources": sources_of(material), **UNITS[unit]}
    expected = reference_curve(tmp_path, *files, steps=len(losses), **settings)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert consumed(paths)[-1] == 2 * 31


def test_resume_in_another_epoch(tmp_path: Path, material: Path, full: tuple[str, RunPaths]) -> None:
    """Bitwise on the same topology, in the same order on another."""
    assert 31 < consumed(full[1])[UNITS[full[0]]["every"] - 1] < 62
    same, other = (continued(tmp_path / str(ranks), material, full, ranks) for ranks in (2, 1))
    run_training(same, 2)
    assert curve(same) == curve(full[1])
    run_training(other, 1)
    assert curve(other)[0] == pytest.approx(curve(full[1])[0], rel=1e-5)
    assert consumed(other) == consumed(full[1])


def test_another_weight_is_refused(tmp_path: Path, material: Path, full: tuple[str, RunPaths]) -> None:
    paths = continued(tmp_path, material, full, 1, weight=2.0)
    (message,) = run_training(paths, 1, function=refused)
    assert "written by a run over other batches: data.sources.pairs.weight was 1.5, is 2.0. Going on would" in message
