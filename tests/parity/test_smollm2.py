"""A real pretrained model under every layout that its 9 heads, 3 KV heads and 30 layers allow on few ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from launcher.contract.rundir import RunPaths, read_lines
from tests.parity.reference import Curve
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.parity.test_topologies import losses_of_targets
from tests.ranks import run_ranks
from tests.tiny_model import write_jsonl

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl"

pytestmark = pytest.mark.parity

SETTINGS: dict[str, Any] = {"max_steps": 2, "global_batch_size": 2, "lr": 1e-5, "clip_grad": 1.0}
Trained = tuple[RunPaths, list[list[float]]]
"""A run, and the loss of each position by example as its last stage computed it."""
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tp1": (1, {}),
    "tp3": (3, {"tensor_parallel": 3}),
    "pp2": (2, {"pipeline_parallel": 2}),
    "dp2": (2, {}),
}
ROWS = [
    ("Which metal is liquid at room temperature?", "Mercury."),
    ("Name a bird that cannot fly.", "The ostrich cannot fly, and neither can the emu."),
    ("How many legs has a spider?", "Eight."),
    ("What do bees make?", "Bees make honey, and wax for their combs."),
    ("Who wrote Hamlet?", "William Shakespeare."),
    ("What is ice?", "Water that is frozen."),
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": question, "completion": answer} for question, answer in ROWS]
    return write_jsonl(tmp_path_factory.mktemp("data") / "questions.jsonl", rows)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, questions: Path) -> Curve:
    steps = SETTINGS["max_steps"]
    settings = {name: value for name, value in SETTINGS.items() if name != "max_steps"}
    return reference_curve(tmp_path_factory.mktemp("reference"), smollm2, questions, steps=steps, **settings)


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, questions: Path) -> Trained:
    """Train under tp3, the layout that only a model with 9 heads allows."""
    ranks, topology = LAYOUTS["tp3"]
    root = tmp_path_factory.mktemp("tp3")
    paths = make_run(root, smollm2, questions, ranks=ranks, topology=topology, **SETTINGS)
    return paths, run_ranks(ranks, losses_of_targets, paths.config, timeout=240)[0]


def test_layout_follows_reference(tensor_parallel: Trained, reference: Curve) -> None:
    assert_follows(tensor_parallel[0], reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "tp3"])
def test_other_layouts_follow_reference(
    name: str, tmp_path: Path, smollm2: Path, questions: Path, reference: Curve
) -> None:
    ranks, topology = LAYOUTS[name]
    paths = make_run(tmp_path, smollm2, questions, ranks=ranks, topology=topology, **SETTINGS)
    run_training(paths, ranks, timeout=240)
    assert_follows(paths, reference)


def assert_follows(paths: RunPaths, reference: Curve) -> None:
    losses, norms = curve(paths)
    assert losses == pytest.approx(reference.losses, rel=1e-5)
    assert norms == pytest.approx(reference.grad_norms, rel=1e-5)


def test_target_losses_equal_transformers(tensor_parallel: Trained, reference: Curve) -> None:
    """Of the first step: the run has more."""
    _, found = tensor_parallel
    first = found[: SETTINGS["global_batch_size"]]
    for row, losses in zip(first, reference.first_step.values(), strict=True):
        assert row[: len(losses)] == pytest.approx(losses, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K.name} is not beside this checkout")
def test_mean_loss_on_gsm8k(tmp_path: Path, smollm2: Path) -> None:
    """1.4238 over 4,127 targets, as transformers gives by itself: answers with `<|im_end|>` and its newline, 32 rows.

    That is with weights as transformers loads a GGUF by default, rounded to bf16. Our conversion keeps what the file
    says in fp32, and both programs then give 1.4225.
    """
    model = rounded_to_bf16(smollm2, tmp_path / "bf16")
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:32]]
    questions = write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    paths = make_run(
        tmp_path,
        model,
        questions,
        ranks=2,
        topology={"pipeline_parallel": 2},
        columns={"prompt": "question", "completion": "answer"},
        seq_length=1024,
        max_steps=1,
        global_batch_size=32,
    )
    run_training(paths, 2, timeout=280)
    step = next(record for record in read_lines(paths.metrics) if "loss" in record)
    assert step["supervised_tokens"] == 4127
    assert step["loss"] == pytest.approx(1.4238, abs=5e-5)


def rounded_to_bf16(source: Path, target: Path) -> Path:
    """A copy of a model whose weight file is in bf16."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, target / "model.safetensors")
    return target
