"""Layers launched as CUDA graphs: the same training as without them, on one GPU and on several."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import sft.engine.module
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import read_resolved
from sft.models.registry import read_architecture
from tests.parity.gradients import Part, join, largest_differences, parts_of, train_and_keep
from tests.parity.runs import curve, make_run, run_training
from tests.parity.test_families import family_model
from tests.parity.test_lora import ALL, lora_run
from tests.tiny_model import FLASH4_HEAD_DIM, make_chat_rows, make_tiny_model, write_jsonl

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

STEPS = 14
FAMILIES = ["qwen2", "qwen3", "gemma3_text", "granite", "ministral3"]
"""Biases; norms of heads; windows, two RoPEs and norms after; multipliers; queries scaled by position."""


def train_and_count(config: Path) -> list[tuple[list[Part], int]]:
    """Train, and return the gradients of each step with the number of forms recorded so far."""
    architecture = read_architecture(Path(read_resolved(config).model.path))
    return train_and_keep(config, lambda chunks: (parts_of(chunks, architecture), recorded_forms(chunks)))


def train_in_small_buckets(config: Path) -> list[tuple[list[Part], int]]:
    """The same, with a bucket for each weight, as large models have them."""
    own = partial(sft.engine.module.DistributedDataParallelConfig, bucket_size=1)
    sft.engine.module.DistributedDataParallelConfig = own
    return train_and_count(config)


def recorded_forms(chunks: list[Any]) -> int:
    return sum(len(chunk.module.graphs.recorded) for chunk in chunks if chunk.module.graphs is not None)


def runs_of(
    root: Path, model: Path, ranks: int, function: Any = train_and_count, **settings: Any
) -> tuple[list[Any], list[RunPaths]]:
    """The gradients and run directories without graphs and with them."""
    chat = write_jsonl(root / "chat.jsonl", make_chat_rows(120, seed=3))
    found, paths = [], []
    for choice in ("never", "always"):
        own = {"max_steps": STEPS, "lr": 1e-3, "precision": "bf16", "packing": True, "kernels": "fused", **settings}
        paths.append(
            make_run(root, model, chat, ranks=ranks, gpus_per_node=ranks, name=choice, cuda_graphs=choice, **own)
        )
        found.append(run_training(paths[-1], ranks, function=function))
    return found, paths


def expect_the_same(root: Path, model: Path, ranks: int, **settings: Any) -> None:
    found, paths = runs_of(root, model, ranks, **settings)
    counts = [[count for _, count in by_rank[0]] for by_rank in found]
    print(f"forms recorded up to each step: {counts[1]}")
    assert not any(counts[0]) and counts[1][-1] > 0
    architecture = read_architecture(model)
    without, by_graphs = (join([[parts for parts, _ in rank] for rank in by_rank], architecture) for by_rank in found)
    for step, (a, b) in enumerate(zip(without, by_graphs, strict=True)):
        differences = largest_differences(b, a)
        print(f"step {step + 1}: {differences}")
        assert max(differences.values()) < 5e-2
    for a, b in zip(*map(curve, paths), strict=True):
        assert b == pytest.approx(a, rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_train_as_without_graphs(family: str, tmp_path: Path) -> None:
    """Two micro-batches a step, so that graphs add to what is there."""
    expect_the_same(tmp_path, family_model(tmp_path / "model", family), 1, global_batch_size=16)


@pytest.mark.parametrize("grad_reduce", ["fp32", "bf16"])
def test_one_gpu_with_flash4_where_it_is_installed(grad_reduce: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", head_dim=FLASH4_HEAD_DIM)
    expect_the_same(tmp_path, model, 1, grad_reduce=grad_reduce, seq_length=512)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_train_as_without_graphs(dora: bool, tmp_path: Path) -> None:
    model, lora = family_model(tmp_path / "model", "qwen2"), dataclasses.replace(ALL, dora=dora)
    chat = write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(120, seed=3))
    own = {"max_steps": STEPS, "lr": 1e-3, "precision": "bf16", "packing": True, "kernels": "fused"}
    curves = []
    for choice in ("never", "always"):
        paths = lora_run(tmp_path, model, chat, lora, ranks=1, gpus_per_node=1, name=choice, cuda_graphs=choice, **own)
        run_training(paths, 1)
        curves.append(curve(paths))
    assert curves[1][0] == pytest.approx(curves[0][0], rel=1e-2)
    assert curves[1][1] == pytest.approx(curves[0][1], rel=5e-2)


@pytest.mark.skipif(GPUS < 2, reason=f"{GPUS} CUDA devices here; data parallelism over NCCL needs 2")
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_several_gpus_reduce_gradients_behind_the_graphs(family: str, distributed: bool, tmp_path: Path) -> None:
    """In buckets of one weight each, which ranks whose rows have no graph in other steps reduce in the same order."""
    model = family_model(tmp_path / "model", family, num_hidden_layers=6)
    own = {"distributed": distributed, "global_batch_size": 32, "overlap": True}
    expect_the_same(tmp_path, model, 2, function=train_in_small_buckets, **own)
