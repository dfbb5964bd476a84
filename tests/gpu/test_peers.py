"""Other trainers of the benchmark on one CUDA device: each trains one layer of a named shape, where it is installed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from launcher.contract.model_shape import named_model_shape
from sft.bench.torchtitan import is_installed, masks_documents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

torchtitan = pytest.mark.skipif(not is_installed(), reason="torchtitan is not installed")
unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed")
CLOCK = {"attention": "auto", "micro_batches": 2, "warmup": 3, "steps": 2}
CHANCE = math.log(named_model_shape("1b").vocab_size)


def loss_of(folder: Path, contender: str, settings: dict[str, object], **workload: object) -> float:
    """Run the contender in a process of its own, as the benchmark does, and return the loss of its last step."""
    request, result = folder / "request.json", folder / "result.json"
    shape = {"shape": "1b", "layers": 1, "seq_length": 512, "rows": 4, **workload}
    request.write_text(json.dumps({"contender": contender, "settings": {**CLOCK, **settings}, "workload": shape}))
    command = [sys.executable, "-m", "sft.bench.contender", str(request), str(result)]
    ran = subprocess.run(command, env={**os.environ, "WORLD_SIZE": "1", "RANK": "0"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    loss: float = json.loads(result.read_text())["loss"]
    return loss


@torchtitan
def test_torchtitan_trains_the_same_as_a_graph(tmp_path: Path) -> None:
    losses = [
        loss_of(tmp_path, "torchtitan", {"weights": "fp32", "graphs": graphs}, data="full")
        for graphs in ("never", "always")
    ]
    assert losses == pytest.approx([losses[0]] * 2, abs=5e-3)
    assert losses[0] == pytest.approx(CHANCE, abs=1.0)


@torchtitan
@pytest.mark.skipif(not masks_documents(), reason=f"torch {torch.__version__} makes no masks of documents for it")
def test_torchtitan_trains_packed_rows(tmp_path: Path) -> None:
    loss = loss_of(tmp_path, "torchtitan", {"weights": "fp32"}, data="ragged")
    assert loss == pytest.approx(CHANCE, abs=1.0)


@unsloth
@pytest.mark.parametrize("data", ["full", "ragged"])
def test_unsloth_trains_adapters(tmp_path: Path, data: str) -> None:
    loss = loss_of(tmp_path, "unsloth", {"weights": "bf16"}, data=data, lora_rank=8)
    assert loss == pytest.approx(CHANCE, abs=1.0)
