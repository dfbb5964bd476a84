"""A run that stopped goes on as if it had not: bitwise on the same topology, to rounding on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.rundir import RunPaths, read_lines
from sft.training.trainer import train
from tests.parity.runs import curve, make_run, refused, run_training
from tests.tiny_model import make_material

# After the project's own way to it, which patches it.
from megatron.core.optimizer import distrib_optimizer, optimizer  # isort: skip

pytestmark = pytest.mark.parity

SETTINGS: dict[str, Any] = {"max_steps": 6, "every": 3, "keep_last": 9}
FULL = (4, {"tensor_parallel": 2, "sequence_parallel": True})


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 36, tied=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> RunPaths:
    """Six uninterrupted steps on tp2 x dp2 with sequence parallel and the distributed optimizer."""
    ranks, topology = FULL
    paths = make_run(tmp_path_factory.mktemp("full"), *material, ranks=ranks, topology=topology, **SETTINGS)
    run_training(paths, ranks)
    return paths


def interrupted(root: Path, material: tuple[Path, Path], full: RunPaths, ranks: int, **settings: Any) -> RunPaths:
    """A run directory as the full run left it after step 3, metrics of two lost steps included."""
    paths = make_run(root, *material, ranks=ranks, **{**SETTINGS, **settings})
    shutil.copytree(full.checkpoint(3), paths.checkpoint(3))
    lines = full.metrics.read_text().splitlines(keepends=True)
    paths.metrics.write_text("".join(lines[:5]))
    return paths


def test_same_topology_is_bitwise(tmp_path: Path, material: tuple[Path, Path], full: RunPaths) -> None:
    ranks, topology = FULL
    paths = interrupted(tmp_path, material, full, ranks, topology=topology)
    run_training(paths, ranks)
    assert curve(paths) == curve(full)


@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        (1, {}),
        (2, {"tensor_parallel": 2}),
        (4, {"pipeline_parallel": 2}),
        (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
        (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ],
    ids=["tp1", "tp2", "pp2_dp2", "pp2_vpp2", "tp2_pp2"],
)
def test_trap_21_other_topology_goes_on(
    ranks: int, topology: dict[str, Any], tmp_path: Path, material: tuple[Path, Path], full: RunPaths
) -> None:
    """Seen to fail without `unshare_steps`, by 1e-3 in the loss (S3 of test_silent_wrong.py)."""
    paths = interrupted(tmp_path, material, full, ranks, topology=topology)
    run_training(paths, ranks)
    expected, found = curve(full), curve(paths)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=3e-5)


def test_a_run_that_goes_on_reads_no_weights_of_its_model(
    tmp_path: Path, material: tuple[Path, Path], full: RunPaths
) -> None:
    """Those of its checkpoint would replace them. Integers in the model's file are refused by whoever reads them."""
    other = shutil.copytree(material[0], tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    paths = interrupted(tmp_path, (other, material[1]), full, 1)
    run_training(paths, 1)
    assert curve(paths)[0] == pytest.approx(curve(full)[0], rel=1e-5)
    fresh = make_run(tmp_path, other, material[1], ranks=1, name="fresh", **SETTINGS)
    with pytest.raises(AssertionError, match="is I32; supported are"):
        run_training(fresh, 1)


def test_trap_16_a_model_that_computes_something_else_is_refused(
    tmp_path: Path, material: tuple[Path, Path], full: RunPaths
) -> None:
    """Seen to go on: its weights have the same shapes. What of a config.json counts: test_numerics.py."""
    other = shutil.copytree(material[0], tmp_path / "other")
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 0.5}))
    paths = interrupted(tmp_path, (other, material[1]), full, 1)
    (message,) = run_training(paths, 1, function=refused)
    assert "step-00000003 was written by a run of another model: layernorm_epsilon was" in message
    assert "is 0.5. The same weights" in message


def test_an_optimizer_stored_otherwise_and_a_run_that_would_train_nothing_are_refused(
    tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Seen to end in a KeyError of Megatron-core's, and in a success without anything to export."""
    whole = make_run(tmp_path, *material, ranks=1, name="whole", max_steps=2, distributed=False)
    run_training(whole, 1)
    there = str(whole.checkpoint(2))
    child: dict[str, Any] = {"ranks": 1, "name": "child", "resume_from": there}
    refusals = {
        "in another form: train.optimizer.distributed was false, is true": {"distributed": True, "max_steps": 3},
        'train.precision was "fp32", is "bf16 or fp8"': {"distributed": False, "precision": "bf16", "max_steps": 3},
        f"checkpoint.resume_from {there}: all 2 steps are done, so that": {"distributed": False, "max_steps": 2},
    }
    for expected, settings in refusals.items():
        paths = make_run(tmp_path, *material, **child, **settings)
        (message,) = run_training(paths, 1, function=refused)
        assert expected in message


def test_steps_after_the_checkpoint_are_logged_once(
    tmp_path: Path, material: tuple[Path, Path], full: RunPaths
) -> None:
    paths = interrupted(tmp_path, material, full, 1)
    run_training(paths, 1)
    assert len(curve(paths)[0]) == 6


@pytest.mark.parametrize("distributed", [True, False])
def test_a_resumed_run_may_have_another_learning_rate_whatever_the_version(
    distributed: bool, tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Megatron-core 0.19 finds the optimizer's groups by it. Seen to fail there with KeyError."""
    settings: dict[str, Any] = {"ranks": 1, "every": 2, "distributed": distributed}
    run_training(make_run(tmp_path, *material, max_steps=2, **settings), 1)
    paths = make_run(tmp_path, *material, max_steps=3, lr=5e-3, **settings)
    run_training(paths, 1, function=train_as_megatron_019)
    assert [record["lr"] for record in read_lines(paths.metrics) if "loss" in record] == [1e-2, 1e-2, 5e-3]


def train_as_megatron_019(config: Path) -> None:
    """Runs on a rank."""
    for module in (optimizer, distrib_optimizer):
        module.param_group_identifier_keys += ("max_lr", "min_lr")
    train(config)
