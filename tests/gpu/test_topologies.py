"""Layouts over NCCL on all GPUs of this machine against one GPU: the same losses and gradient norms.

All runs are made at once, because a rank needs seconds to start and the model is tiny; the tests look at what came of
them. Any number of GPUs does: a layout takes all of them.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.contract.rundir import RunPaths
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.tiny_model import FLASH4_HEAD_DIM, make_material

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} CUDA devices here; layouts over NCCL need 2"),
    pytest.mark.timeout(600),
]

STEPS = 12
AT_ONCE = 6
TENSOR = {"tensor_parallel": GPUS}
PIPELINE = {"pipeline_parallel": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"topology": TENSOR},
    "tp-sp": {"topology": {**TENSOR, "sequence_parallel": True}},
    "pp": {"topology": {**PIPELINE, "layers_per_stage": [3, 1]}},
    "vpp": {"topology": {**PIPELINE, "virtual_pipeline": 2}},
    "dp": {},
    "dp-whole-optimizer": {"distributed": False},
}
if GPUS >= 4:
    LAYOUTS["tp2-pp2-sp"] = {"topology": {"tensor_parallel": 2, "sequence_parallel": True, **PIPELINE}}
    LAYOUTS["tp2-dp"] = {"topology": {"tensor_parallel": 2}}
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp32-packed": {"precision": "fp32", "packing": True},
    "bf16-packed": {"precision": "bf16", "packing": True},
    "fp8-packed": {"precision": "fp8", "packing": True},
}
MOVES = [("dp", "tp-sp"), ("tp-sp", "pp"), ("pp", "dp")]
Curves = dict[tuple[str, str], tuple[list[float], list[float]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def material(root: Path) -> tuple[Path, Path]:
    return make_material(root / "material", 100, head_dim=FLASH4_HEAD_DIM)


def prepared(root: Path, material: tuple[Path, Path], layout: str, form: str, **settings: Any) -> RunPaths:
    ranks = 1 if layout == "one" else GPUS
    own = {"max_steps": STEPS, "lr": 1e-3, "global_batch_size": 8 * GPUS, "seq_length": 256, **FORMS[form]}
    given = {**own, **LAYOUTS.get(layout, {}), "name": f"{layout}-{form}", **settings}
    return make_run(root, *material, ranks=ranks, gpus_per_node=ranks, **given)


def at_once(runs: dict[tuple[str, str], tuple[RunPaths, int]]) -> Curves:
    """Train all; the curve of each that ended well."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = {key: pool.submit(run_training, paths, ranks, 400.0) for key, (paths, ranks) in runs.items()}
    failed = {key: done.exception() for key, done in waiting.items() if done.exception() is not None}
    for key, error in failed.items():
        print(f"{key} failed: {error}")
    return {key: curve(paths) for key, (paths, _) in runs.items() if key not in failed}


@pytest.fixture(scope="module")
def curves(root: Path, material: tuple[Path, Path]) -> Curves:
    """Every layout in every form, and each form on one GPU; with a checkpoint after half of the steps."""
    cases = [
        (layout, form) for form in FORMS for layout in ("one", *LAYOUTS) if form != "fp8-packed" or layout != "vpp"
    ]
    every = {"every": STEPS // 2, "keep_last": 9}
    return at_once(
        {
            (layout, form): (prepared(root, material, layout, form, **every), 1 if layout == "one" else GPUS)
            for layout, form in cases
        }
    )


def found(curves: Curves, layout: str, form: str) -> tuple[list[float], list[float]]:
    if (layout, form) not in curves:
        pytest.fail(f"the run of {layout}, {form} failed; its error is in the output of the first test that ran it")
    return curves[layout, form]


def test_one_gpu_follows_plain_pytorch(tmp_path: Path, material: tuple[Path, Path], curves: Curves) -> None:
    reference = reference_curve(tmp_path, *material, steps=STEPS, lr=1e-3, global_batch_size=8 * GPUS)
    assert found(curves, "one", "fp32")[0] == pytest.approx(reference.losses, rel=1e-4)


@pytest.mark.parametrize("form", ["fp32", "fp32-packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_is_that_of_one_gpu(layout: str, form: str, curves: Curves) -> None:
    losses, norms = found(curves, layout, form)
    exact_losses, exact_norms = found(curves, "one", form)
    assert losses == pytest.approx(exact_losses, rel=1e-5)
    assert norms == pytest.approx(exact_norms, rel=1e-4)


@pytest.mark.parametrize(("form", "most"), [("bf16-packed", 2e-2), ("fp8-packed", 4e-2)])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "vpp"])
def test_low_precision_stays_near_one_gpu(layout: str, form: str, most: float, curves: Curves) -> None:
    """Each loss a little off, by other orders of rounding, and all together not."""
    pairs = zip(found(curves, layout, form)[0], found(curves, "one", form)[0], strict=True)
    residuals = [own / one - 1 for own, one in pairs]
    assert max(map(abs, residuals)) < most
    assert abs(sum(residuals) / STEPS) < most / 4


@pytest.fixture(scope="module")
def moved(root: Path, material: tuple[Path, Path], curves: Curves) -> Curves:
    """Runs that go on from another layout's checkpoint."""
    runs = {}
    for before, after in MOVES:
        source = RunPaths(root / f"{before}-fp32")
        paths = prepared(root, material, after, "fp32", name=f"{before}-to-{after}")
        shutil.copytree(source.checkpoint(STEPS // 2), paths.checkpoint(STEPS // 2))
        shutil.copy(source.metrics, paths.metrics)
        runs[before, after] = (paths, GPUS)
    return at_once(runs)


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_run_goes_on_under_another_layout(before: str, after: str, moved: Curves, curves: Curves) -> None:
    assert found(moved, before, after)[0] == pytest.approx(found(curves, "one", "fp32")[0], rel=1e-5)
