"""Communication behind computation changes no number: small buckets, evaluations and checkpoints in between."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sft.engine.module
import sft.megatron.layers.fused
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, read_lines
from sft.megatron.core import DistributedOptimizer
from sft.training.trainer import train
from tests.parity.runs import curve, make_run
from tests.ranks import run_ranks
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"kernels": "plain"},
    "fused_packed": {"kernels": "fused", "packing": True, "seq_length": 256},
}
BUCKET = 5_000
"""Parameters; the tiny model has some 200,000."""


def train_in_small_buckets(config: Path, awaiting: bool = True, fixed: bool = True) -> ExitCode:
    """Runs on a rank: training with buckets so small that nearly each weight waits for a gathering of its own."""
    sft.engine.module.DistributedDataParallelConfig = partial(
        sft.engine.module.DistributedDataParallelConfig, bucket_size=BUCKET
    )  # type: ignore[misc,assignment]
    if not fixed:
        DistributedOptimizer.sharded_param_state_fully_reshardable = (
            DistributedOptimizer.sharded_param_state_fully_reshardable.__wrapped__
        )
    if not awaiting:
        sft.megatron.layers.fused.await_weights = lambda module: None
    return train(config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Model, training data, held-out data."""
    root = tmp_path_factory.mktemp("data")
    rows = make_chat_rows(48, seed=3)
    held_out = write_jsonl(root / "held-out.jsonl", rows[40:])
    return make_tiny_model(root / "model"), write_jsonl(root / "chat.jsonl", rows[:40]), held_out


def run(root: Path, data: tuple[Path, Path, Path], name: str, form: str, **settings: Any) -> RunPaths:
    model, chat, held_out = data
    given = {"max_steps": 6, "every": 2, "keep_last": 9, "eval_every": 2, **FORMS[form], **settings}
    return make_run(root, model, chat, ranks=2, name=name, held_out=held_out, **given)


def all_numbers(paths: RunPaths) -> list[dict[str, Any]]:
    told = ("step", "loss", "grad_norm", "eval_loss")
    return [{key: line[key] for key in told if key in line} for line in read_lines(paths.metrics)]


@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.slow), "fused_packed"])
def test_overlap_changes_no_number(form: str, tmp_path: Path, data: tuple[Path, Path, Path]) -> None:
    whole = run(tmp_path, data, "whole", form)
    assert run_ranks(2, train_in_small_buckets, whole.config) == [ExitCode.OK] * 2
    paths = run(tmp_path, data, "overlapped", form, overlap=True)
    assert run_ranks(2, train_in_small_buckets, paths.config) == [ExitCode.OK] * 2
    assert any("eval_loss" in line for line in all_numbers(paths))
    for found, expected in zip(all_numbers(paths), all_numbers(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)  # the norm is summed up by buckets
    again = run(tmp_path, data, "resumed", form, overlap=True)
    shutil.copytree(paths.checkpoint(4), again.checkpoint(4))
    shutil.copy(paths.metrics, again.metrics)
    assert run_ranks(2, train_in_small_buckets, again.config) == [ExitCode.OK] * 2
    assert curve(again) == curve(paths)


def test_weights_that_nobody_waits_for_are_old(tmp_path: Path, data: tuple[Path, Path, Path]) -> None:
    """What `await_weights` is for: fused layers use weights outside of the forward passes whose hooks wait."""
    whole = run(tmp_path, data, "whole", "fused_packed", max_steps=3)
    assert run_ranks(2, train_in_small_buckets, whole.config) == [ExitCode.OK] * 2
    paths = run(tmp_path, data, "careless", "fused_packed", max_steps=3, overlap=True)
    assert run_ranks(2, train_in_small_buckets, paths.config, False) == [ExitCode.OK] * 2
    assert curve(paths)[0] != pytest.approx(curve(whole)[0], rel=1e-5)


def test_optimizer_state_of_padded_buckets_would_be_shifted(tmp_path: Path, data: tuple[Path, Path, Path]) -> None:
    """Megatron-core's own checkpoint of several buckets (patches/bucket_padding.py): a resume starts anew."""
    settings: dict[str, Any] = {"overlap": True, "max_steps": 4}
    paths = run(tmp_path, data, "whole", "plain", **settings)
    assert run_ranks(2, train_in_small_buckets, paths.config, True, False) == [ExitCode.OK] * 2
    again = run(tmp_path, data, "resumed", "plain", **settings)
    shutil.copytree(paths.checkpoint(2), again.checkpoint(2))
    shutil.copy(paths.metrics, again.metrics)
    assert run_ranks(2, train_in_small_buckets, again.config, True, False) == [ExitCode.OK] * 2
    assert abs(curve(again)[0][3] - curve(paths)[0][3]) > 0.1
