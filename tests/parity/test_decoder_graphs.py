"""What graphs of the layers compute, without a GPU: passes over filled-up rows that add to gradient buffers themselves.

A stand-in computes anew what a graph would repeat. That the graphs do is tested on GPUs
(tests/gpu/test_decoder_graphs.py).
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from contextlib import redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import sft.engine.module
from launcher.contract.exit_codes import ExitCode
from sft.megatron import decoder_graphs, kernel_choice
from sft.megatron.decoder_graphs import DecoderGraphs, Inputs, Passes, Recorded, stand_ins_of
from sft.megatron.layers.packed_rows import PackedSequences
from sft.models.registry import read_architecture
from sft.training.trainer import train
from tests.parity.gradients import Part, join, train_and_capture
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.parity.test_families import RATE, family_model
from tests.parity.test_grid import assert_gradients_equal
from tests.parity.test_guard import events, train_with_bad_steps
from tests.parity.test_lora import ALL, adapted, expected_curve, lora_run
from tests.parity.test_lora import STEPS as STEPS_OF_LORA
from tests.ranks import RankFailure
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 4
FAMILIES = ["qwen3", "gemma3_text", "granite", "ministral3"]
"""Norms of heads; windows, two RoPEs and norms after; multipliers; queries scaled by position."""
FURTHER = [
    "gemma",
    "gemma_untied",
    "granite_tied",
    "llama_biased_attention",
    "llama_tied",
    "ministral3_tied",
    "mistral",
    "phi3_longrope",
    "phi3_partial_rope",
    "qwen2_windows",
    "smollm3",
    "smollm3_by_interval",
]
"""One-headed KV, tied embeddings, biases of both projections, windows in all layers and in some, angles of a part of
each head, layers without RoPE."""
ADAPTED: dict[str, Any] = {"ranks": 1, "max_steps": STEPS_OF_LORA, "packing": True, "kernels": "fused"}


class HostInputs(Inputs):
    """Says the sequences' lengths truly: on a CPU attention reads them."""

    @property
    def sequences(self) -> PackedSequences:
        found = super().sequences
        found.seq_lengths = tuple(length for length in self.offsets.diff().tolist() if length)
        return found


class Repeated(Recorded):
    """Computes anew what a graph would repeat, from the memory of the weights as it was when the graph was recorded."""

    def _record(self, decoder: DecoderGraphs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._stand_ins = [stand_ins_of(segment.layers) for segment in self._segments]
        states = [torch.zeros_like(self.inputs.hidden) for _ in range(3)]
        return states[0], states[1], states[2]

    def forward(self) -> None:
        self._passes = Passes(self._segments, self.inputs, self._angles)
        self._passes._stand_ins = self._stand_ins
        for part in range(len(self._segments)):
            with torch.enable_grad():  # as where a graph is recorded
                output = self._passes.forward(part)
        self.output.copy_(output)

    def backward(self) -> None:
        grad = self.output_grad.clone()
        for part in reversed(range(len(self._segments))):
            grad = self._passes.backward(part, grad)
            self._segments[part].have_gradients(self._passes.added[part])
        self.input_grad.copy_(grad)


def train_by_stand_ins(config: Path) -> list[list[Part]]:
    """Train on a rank that takes its CPU for a GPU with graphs."""
    steps, by_graph = train_and_watch(config)
    assert any(by_graph)
    return steps


def train_mixed(config: Path) -> list[list[Part]]:
    """The same, where rows of a new form come behind repeated ones."""
    steps, by_graph = train_and_watch(config)
    assert (True, False) in pairwise(by_graph)
    return steps


def train_adapters(config: Path) -> None:
    """The same, without looking at gradients."""
    _, by_graph = train_and_watch(config, train)
    assert any(by_graph)


def train_and_watch(config: Path, function: Any = train_and_capture) -> tuple[Any, list[bool]]:
    """Train by a function of that form, and return its result, and of each row whether it had a graph."""
    by_graph: list[bool] = []

    class Counted(Repeated):
        def forward(self) -> None:
            super().forward()
            by_graph.append(True)

    class Mixed(DecoderGraphs):
        def _without_graph(self, *row: Any) -> torch.Tensor:
            by_graph.append(False)
            return super()._without_graph(*row)

    kernel_choice._graphs = lambda *_, **__: True
    decoder_graphs.free_memory = lambda _: 2**40
    decoder_graphs.Inputs = HostInputs  # type: ignore[misc]
    decoder_graphs.Recorded = Counted  # type: ignore[misc]
    sft.engine.module.DecoderGraphs = Mixed  # type: ignore[misc]
    return function(config), by_graph


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


def expect_reference(
    root: Path, model: Path, chat: Path, ranks: int, function: Any = train_by_stand_ins, **settings: Any
) -> None:
    own = {**RATE, "global_batch_size": 8, "seq_length": 128}
    expected = reference_curve(root / "reference", model, chat, steps=STEPS, **own)
    fused = {"packing": True, "kernels": "fused"}
    paths = make_run(root, model, chat, ranks=ranks, max_steps=STEPS, **own, **fused, **settings)
    by_rank = run_training(paths, ranks, function=function)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=2e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-4)
    found = join(by_rank, read_architecture(model))
    for gradients, exact in zip(found[:2], expected.gradients[:2], strict=True):
        assert_gradients_equal(gradients, exact)


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(case, marks=pytest.mark.slow) for case in FURTHER)])
def test_every_gradient_follows_reference(family: str, tmp_path: Path, chat: Path) -> None:
    """Several micro-batches a step: the first of a step adds to what is there, too."""
    expect_reference(tmp_path, family_model(tmp_path / "model", family), chat, 1)


def test_rows_of_a_new_form_behind_repeated_ones(tmp_path: Path, chat: Path) -> None:
    """Their gradients of norms and biases, too, which autograd brings and Megatron-core's hook adds."""
    expect_reference(tmp_path, family_model(tmp_path / "model", "qwen2"), chat, 1, train_mixed)


def test_adapters_follow_plain_pytorch(tmp_path: Path, chat: Path) -> None:
    """Frozen embeddings need no gradient, and frozen weights have no buffer."""
    model = family_model(tmp_path / "model", "qwen2")
    expected = expected_curve(tmp_path / "reference", model, chat, lambda spec: adapted(model, ALL, spec.train.seed))
    paths = lora_run(tmp_path, model, chat, ALL, **ADAPTED)
    run_training(paths, 1, function=train_adapters)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-4)


def test_dora_trains_as_without_graphs(tmp_path: Path, chat: Path) -> None:
    """Its norms are computed anew for each row."""
    model, lora = family_model(tmp_path / "model", "qwen2"), dataclasses.replace(ALL, dora=True)
    curves = []
    for name, function in (("without", None), ("graphs", train_adapters)):
        paths = lora_run(tmp_path, model, chat, lora, name=name, **ADAPTED)
        run_training(paths, 1, function=function)
        curves.append(curve(paths))
    assert curves[1][0] == pytest.approx(curves[0][0], rel=1e-6)
    assert curves[1][1] == pytest.approx(curves[0][1], rel=1e-5)


def train_where_nothing_is_recorded(config: Path) -> tuple[list[list[Part]], str]:
    """Train where recording fails, and return the gradients and what was said."""

    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    Repeated._record = fails  # type: ignore[method-assign,assignment]
    said = io.StringIO()
    with redirect_stdout(said):
        steps, by_graph = train_and_watch(config)
    assert not any(by_graph)
    return steps, said.getvalue()


def test_a_run_goes_on_where_graphs_cannot_be_recorded(tmp_path: Path, chat: Path) -> None:
    """Unless the config says always."""
    model = family_model(tmp_path / "model", "qwen3")
    curves = []
    for name, function in (("without", None), ("failed", train_where_nothing_is_recorded)):
        paths = make_run(tmp_path, model, chat, ranks=1, name=name, max_steps=STEPS, packing=True, kernels="fused")
        results = run_training(paths, 1, function=function)
        curves.append(curve(paths))
    assert curves[1][0] == pytest.approx(curves[0][0], rel=1e-6)
    said = results[0][1]
    assert said.count("cannot be recorded here: operation not permitted when stream is capturing") == 1
    paths = make_run(
        tmp_path, model, chat, ranks=1, name="always", max_steps=STEPS, packing=True, kernels="fused",
        cuda_graphs="always", precision="bf16",
    )  # fmt: skip
    with pytest.raises(RankFailure, match="operation not permitted"):
        run_training(paths, 1, function=train_where_nothing_is_recorded)


def train_with_a_bad_step(config: Path) -> None:
    """Train with a loss of NaN in the fourth step, behind which weights are loaded."""
    (code, _), by_graph = train_and_watch(config, partial(train_with_bad_steps, factor=math.nan, first=4, last=4))
    assert code == ExitCode.OK and by_graph[-1]


def test_weights_are_loaded_into_the_memory_that_graphs_read(tmp_path: Path, chat: Path) -> None:
    """Of a run that goes back to a checkpoint, evaluates between its steps, and does not train one weight."""
    model = family_model(tmp_path / "model", "qwen2")
    settings: dict[str, Any] = {"max_steps": 7, "packing": True, "kernels": "fused", "held_out": chat, "eval_every": 2}
    settings |= {"on_bad_step": "rewind", "every": 2, "keep_last": 9, "lr_by_name": {"*.0.mlp.down_proj.weight": 0.0}}
    curves = []
    for name, function in (("graphs", train_with_a_bad_step), ("without", train_with_a_bad_step_without_graphs)):
        paths = make_run(tmp_path, model, chat, ranks=1, name=name, **settings)
        run_training(paths, 1, function=function)
        assert [event["step"] for event in events(paths, "rewound")] == [4]
        curves.append(curve(paths))
    for graphs, without in zip(*curves, strict=True):
        assert graphs == pytest.approx(without, rel=1e-5, nan_ok=True)


def train_with_a_bad_step_without_graphs(config: Path) -> None:
    """The same with layers launched one by one."""
    assert train_with_bad_steps(config, math.nan, 4, 4)[0] == ExitCode.OK


def train_in_small_buckets(config: Path) -> list[list[Part]]:
    """The same, with a bucket for each weight, and with graphs on the first rank alone."""
    own = partial(sft.engine.module.DistributedDataParallelConfig, bucket_size=1)
    sft.engine.module.DistributedDataParallelConfig = own
    if os.environ["RANK"] == "0":
        return train_by_stand_ins(config)
    decoder_graphs.DecoderGraphs._has_room = lambda *_: False  # type: ignore[method-assign]
    steps, by_graph = train_and_watch(config)
    assert not any(by_graph)
    return steps


@pytest.mark.parametrize(
    ("family", "distributed"),
    [
        ("gemma3_text", True),
        pytest.param("gemma3_text", False, marks=pytest.mark.slow),
        pytest.param("qwen3", True, marks=pytest.mark.slow),
    ],
)
def test_ranks_with_and_without_graphs_communicate_in_the_same_order(
    family: str, distributed: bool, tmp_path: Path, chat: Path
) -> None:
    """Buckets of gradients, which are reduced behind the backward pass, and of weights, which are gathered behind the
    forward pass: norms behind a layer's MLP are registered far from where they are used."""
    model = family_model(tmp_path / "model", family, num_hidden_layers=5)
    expect_reference(tmp_path, model, chat, 2, train_in_small_buckets, overlap=True, distributed=distributed)
