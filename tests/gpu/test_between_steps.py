"""What happens in and between steps, on one CUDA device: no waiting, no bad update, snapshots, answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sft.engine.module
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import read_lines
from launcher.contract.spec import EvaluationSpec
from sft.training.trainer import train
from tests.parity.runs import curve, make_run, run_training
from tests.parity.test_checkpoint import train_with_slow_disk
from tests.parity.test_generation import NEW_TOKENS, QUESTIONS, answers_of, transformers_answer
from tests.parity.test_guard import train_with_bad_steps
from tests.ranks import run_ranks
from tests.tiny_model import FLASH4_HEAD_DIM, make_material, write_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 100, head_dim=FLASH4_HEAD_DIM)


def train_without_waiting(config: Path) -> ExitCode:
    """Runs on a rank: from the fourth step on, whatever makes the host wait for the device raises."""
    training_step = sft.engine.module.SFTGPT.training_step

    def step(self: sft.engine.module.SFTGPT, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if batch_idx >= 3 else "default")
        try:
            training_step(self, batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    sft.engine.module.SFTGPT.training_step = step  # type: ignore[method-assign]
    return train(config)


@pytest.mark.parametrize("settings", [{}, {"packing": True}], ids=["padded", "packed"])
def test_a_step_never_waits_for_the_device(
    settings: dict[str, Any], tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Forward, backward, clipping, verdict, update. Seen to fail: with one constant of the verdict made on the host."""
    settings = {"precision": "bf16", "spike_factor": 100.0, **settings}
    paths = make_run(tmp_path, *material, ranks=1, gpus_per_node=1, max_steps=8, **settings)
    assert run_ranks(1, train_without_waiting, paths.config) == [ExitCode.OK]


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {}, {"distributed": False}], ids=["bf16", "fp32", "plain"])
def test_bad_step_changes_nothing(settings: dict[str, Any], tmp_path: Path, material: tuple[Path, Path]) -> None:
    settings = {"on_bad_step": "skip", "max_steps": 5, **settings}
    paths = make_run(tmp_path, *material, ranks=1, gpus_per_node=1, **settings)
    ((code, states),) = run_ranks(1, train_with_bad_steps, paths.config, float("nan"), 3, 3)
    assert code == ExitCode.OK
    assert states[3] == states[2]
    assert len(set(states)) == 4
    assert [record["step"] for record in read_lines(paths.bad_steps)] == [3]


def test_asynchronous_save_is_of_the_step_it_began_at(tmp_path: Path, material: tuple[Path, Path]) -> None:
    settings = {"gpus_per_node": 1, "every": 2, "keep_last": 9, "max_steps": 7, "precision": "bf16"}
    whole = make_run(tmp_path, *material, ranks=1, name="whole", **settings)
    run_training(whole, 1)
    paths = make_run(tmp_path, *material, ranks=1, asynchronous=True, **settings)
    assert [code for code, _ in run_ranks(1, train_with_slow_disk, paths.config)] == [ExitCode.OK]
    again = make_run(tmp_path, *material, ranks=1, name="again", **settings)
    shutil.copytree(paths.checkpoint(2), again.checkpoint(2))
    shutil.copy(paths.metrics, again.metrics)
    run_training(again, 1)
    assert curve(again) == curve(paths) == curve(whole)


def test_greedy_answers_equal_transformers(tmp_path: Path, material: tuple[Path, Path]) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    asked = EvaluationSpec(prompts=str(prompts), max_new_tokens=NEW_TOKENS, batch_size=3)
    paths = make_run(tmp_path, *material, ranks=1, gpus_per_node=1, max_steps=1, evaluation=asked)
    (found,) = run_ranks(1, answers_of, paths.config)
    expected = [transformers_answer(material[0], question) for question in QUESTIONS]
    assert [found[number] for number in range(len(QUESTIONS))] == expected
