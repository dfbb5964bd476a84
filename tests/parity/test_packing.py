"""Packed rows train what the same examples train alone: nothing passes between neighbours, on any stage.

Numbering of traps as in the notes of the project on silent errors of fine-tuning.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import sft.engine.module
from launcher.contract.rundir import RunPaths, read_lines
from sft.data.batches.batch import MicroBatch
from sft.megatron.layers.core_attention import CoreAttention
from sft.training.trainer import train
from tests.parity.runs import curve, make_run, refused, run_training
from tests.tiny_model import make_chat_rows, make_material, write_jsonl

pytestmark = pytest.mark.parity

PACKED: dict[str, dict[str, Any]] = {
    "examples": {"packing": True},
    "tokens": {"packing": True, "global_batch_unit": "tokens", "global_batch_size": 1024},
}
WITHOUT_PACKING = {"examples": {}, "tokens": {**PACKED["tokens"], "packing": False}}
TP2_PP2 = (4, {"tensor_parallel": 2, "pipeline_parallel": 2})


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 20)


@dataclass(slots=True)
class Pass:
    """One forward pass of one rank: its row, and what became of it."""

    tokens: list[int]
    labels: list[int]
    seq_lengths: tuple[int, ...]
    losses: list[float] = field(default_factory=list)
    """Of each position; empty before the last stage."""
    queries: list[NDArray[np.float32]] = field(default_factory=list)
    """What attention gets in each layer of this stage, after RoPE: [position, heads, dim]."""

    def sequences(self) -> Iterator[tuple[tuple[int, ...], slice]]:
        """(tokens, place) of each sequence that is not padding."""
        ends = np.cumsum(self.seq_lengths)
        for end, length in zip(ends.tolist(), self.seq_lengths, strict=True):
            place = slice(end - length, end)
            if any(self.labels[place]):
                yield tuple(self.tokens[place]), place


def trace(config: Path) -> list[Pass]:
    """Runs on a rank: train, and keep every forward pass."""
    passes: list[Pass] = []
    forward_step, weighted_sum, attention = (
        sft.engine.module._forward_step,
        sft.engine.module._weighted_sum,
        CoreAttention.forward,
    )

    def step(iterator: Iterator[MicroBatch], model: Any, **more: Any) -> Any:
        batch = next(iterator)
        used = int(batch.labels.count_nonzero())  # padded rows of one example; no label of a target is 0 in this data
        lengths = batch.seq_lengths or (used, batch.tokens.size(1) - used)
        passes.append(Pass(batch.tokens[0].tolist(), batch.labels[0].tolist(), lengths))
        return forward_step(iter([batch]), model, **more)

    def weigh(weights: torch.Tensor, losses: torch.Tensor) -> Any:
        passes[-1].losses = losses.detach().flatten().tolist()
        return weighted_sum(weights, losses)

    def attend(self: CoreAttention, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        passes[-1].queries.append(query.detach().reshape(len(query), -1, query.size(-1)).numpy().copy())
        return attention(self, query, *args, **kwargs)

    sft.engine.module._forward_step, sft.engine.module._weighted_sum, CoreAttention.forward = step, weigh, attend  # type: ignore[assignment]
    train(config)
    return passes


def trace_perturbed(config: Path) -> list[Pass]:
    """Runs on a rank: the same with other tokens in the first sequence of each row."""
    forward_step = sft.engine.module._forward_step

    def step(iterator: Iterator[MicroBatch], model: Any, **more: Any) -> Any:
        batch = next(iterator)
        assert batch.seq_lengths is not None
        tokens = batch.tokens.clone()
        tokens[0, : batch.seq_lengths[0]] = (tokens[0, : batch.seq_lengths[0]] + 1) % 331
        return forward_step(iter([dataclasses.replace(batch, tokens=tokens)]), model, **more)

    sft.engine.module._forward_step = step
    return trace(config)


def embedding_gradients(config: Path) -> list[tuple[tuple[int, ...], list[float]]]:
    """Runs on a rank: train on the second sequence of each row alone; (lengths, gradient at each embedding)."""
    found: list[tuple[tuple[int, ...], list[float]]] = []
    forward_step = sft.engine.module._forward_step

    def step(iterator: Iterator[MicroBatch], model: Any, **more: Any) -> Any:
        batch = next(iterator)
        assert batch.seq_lengths is not None and batch.cu_seqlens is not None
        lengths, (first, second) = batch.seq_lengths, batch.cu_seqlens[1:3].tolist()
        weights = torch.zeros_like(batch.loss_weights)
        weights[0, first:second] = 1.0

        def keep(gradient: torch.Tensor) -> None:
            found.append((lengths, gradient.abs().sum(dim=(1, 2)).tolist()))

        hook = model.module.embedding.register_forward_hook(lambda _, __, output: output.register_hook(keep) and None)
        output = forward_step(iter([dataclasses.replace(batch, loss_weights=weights)]), model, **more)
        hook.remove()
        return output

    sft.engine.module._forward_step = step
    train(config)
    return found


def first_steps(
    root: Path,
    material: tuple[Path, Path],
    ranks: int,
    topology: dict[str, Any],
    function: Any = trace,
    **settings: Any,
) -> list[Any]:
    """What `function` gives on each rank for one step of eight examples."""
    paths = make_run(root, *material, ranks=ranks, topology=topology, max_steps=1, **settings)
    return run_training(paths, ranks, function=function)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_trap_4_no_gradient_reaches_a_neighbour(
    tensor_parallel: int, tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Exactly 0, not small. Seen to fail with all sequences of a row attended to as one."""
    topology = {"tensor_parallel": tensor_parallel}
    by_rank = first_steps(tmp_path, material, tensor_parallel, topology, embedding_gradients, packing=True)
    for rows in by_rank:
        assert rows
        for lengths, gradients in rows:
            first, second = lengths[0], lengths[0] + lengths[1]
            assert all(gradient > 0 for gradient in gradients[first : second - 1])
            assert not any(gradients[:first])
            assert not any(gradients[second:])


@pytest.mark.parametrize(("ranks", "topology"), [(1, {}), TP2_PP2], ids=["tp1", "tp2_pp2"])
def test_trap_4_a_neighbour_changes_no_loss(
    ranks: int, topology: dict[str, Any], tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Bitwise. Seen to fail with all sequences of a row attended to as one on the last stage only."""
    plain = first_steps(tmp_path / "plain", material, ranks, topology, packing=True)[-1]
    changed = first_steps(tmp_path / "changed", material, ranks, topology, trace_perturbed, packing=True)[-1]
    assert len(plain) == len(changed) > 0
    for before, after in zip(plain, changed, strict=True):
        first = before.seq_lengths[0]
        assert before.seq_lengths == after.seq_lengths
        assert before.losses[:first] != after.losses[:first]
        assert before.losses[first:] == after.losses[first:]


@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        (1, {}),
        TP2_PP2,
        pytest.param(2, {"tensor_parallel": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
    ids=["tp1", "tp2_pp2", "tp2_sp"],
)
def test_trap_12_positions_begin_anew_on_every_stage(
    ranks: int, topology: dict[str, Any], tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Queries after RoPE, and losses, are those of the example alone; losses by themselves would not show positions
    that run on, since RoPE is relative. Seen to fail with offsets (0, length of the row) for RoPE."""
    packed = first_steps(tmp_path / "packed", material, ranks, topology, packing=True)
    alone = first_steps(tmp_path / "alone", material, ranks, topology)
    for rank in range(ranks):
        expected = {tokens: (row, place) for row in alone[rank] for tokens, place in row.sequences()}
        found = {tokens: (row, place) for row in packed[rank] for tokens, place in row.sequences()}
        assert expected.keys() == found.keys()
        assert len(found) == 8
        assert all(row.queries for row in packed[rank])
        assert any(place.start for _, place in found.values())
        for tokens, (row, place) in found.items():
            other, other_place = expected[tokens]
            assert row.labels[place] == other.labels[other_place]
            assert row.losses[place] == pytest.approx(other.losses[other_place], abs=1e-5)
            for layer, queries in enumerate(row.queries):
                np.testing.assert_allclose(queries[place], other.queries[layer][other_place], atol=2e-5)


def test_trap_6_the_amount_of_padding_changes_no_loss(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """Seen to fail with rows that are filled to the end by repeating the last example's tokens and weights."""
    (short,) = first_steps(tmp_path / "short", material, 1, {}, packing=True, pad_to_multiple=1)
    (long,) = first_steps(tmp_path / "long", material, 1, {}, packing=True, pad_to_multiple=512)
    assert curve(RunPaths(tmp_path / "long" / "run"))[0] == pytest.approx(
        curve(RunPaths(tmp_path / "short" / "run"))[0], rel=1e-6
    )
    for row, padded in zip(short, long, strict=True):
        assert len(padded.tokens) == 512 > len(row.tokens)
        assert list(row.sequences()) == list(padded.sequences())
        used = max(place.stop for _, place in row.sequences())
        assert padded.losses[:used] == pytest.approx(row.losses[:used], abs=1e-5)


@pytest.fixture(scope="module", params=PACKED)
def full(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]
) -> tuple[str, RunPaths]:
    """Six uninterrupted packed steps, two epochs and more, on tp2 x dp2 with sequence parallel."""
    ranks, topology = 4, {"tensor_parallel": 2, "sequence_parallel": True}
    root = tmp_path_factory.mktemp("full")
    paths = make_run(root, *material, ranks=ranks, topology=topology, **RESUMED, **PACKED[request.param])
    run_training(paths, ranks)
    return request.param, paths


RESUMED: dict[str, Any] = {"max_steps": 6, "every": 4, "keep_last": 9, "lr": 1e-3}


def resumed(root: Path, material: tuple[Path, Path], full: RunPaths, ranks: int, **settings: Any) -> RunPaths:
    """A run directory as the full run left it after step 4."""
    paths = make_run(root, *material, ranks=ranks, **RESUMED, **settings)
    shutil.copytree(full.checkpoint(4), paths.checkpoint(4))
    shutil.copy(full.metrics, paths.metrics)
    return paths


def test_trap_16_resume_of_packed_steps_is_bitwise(
    tmp_path: Path, material: tuple[Path, Path], full: tuple[str, RunPaths]
) -> None:
    """Seen to fail with an order that is drawn from one generator as training goes, which starts anew on resume."""
    unit, before = full
    topology = {"tensor_parallel": 2, "sequence_parallel": True}
    paths = resumed(tmp_path, material, before, 4, topology=topology, **PACKED[unit])
    run_training(paths, 4)
    assert curve(paths) == curve(before)


def test_trap_16_packed_steps_go_on_in_the_same_order_elsewhere(
    tmp_path: Path, material: tuple[Path, Path], full: tuple[str, RunPaths]
) -> None:
    """Seen to fail with an epoch packed into rows whose length depends on the number of ranks."""
    unit, before = full
    paths = resumed(tmp_path, material, before, 2, topology={"pipeline_parallel": 2}, **PACKED[unit])
    run_training(paths, 2)
    assert curve(paths)[0] == pytest.approx(curve(before)[0], rel=1e-5)
    assert counts(paths) == counts(before)


def test_trap_16_other_packing_is_refused(
    tmp_path: Path, material: tuple[Path, Path], full: tuple[str, RunPaths]
) -> None:
    """Seen to fail with a key of the data that leaves packing out. All that the key holds: test_datamodule.py."""
    unit, before = full
    paths = resumed(tmp_path, material, before, 1, **{**PACKED[unit], "packing": False})
    (message,) = run_training(paths, 1, function=refused)
    assert "was written by a run over other batches: data.packing was true, is false" in message


@pytest.mark.parametrize("unit", PACKED)
def test_trap_19_evaluation_is_the_same_in_any_form(unit: str, tmp_path: Path, material: tuple[Path, Path]) -> None:
    """13 held-out examples. Seen to fail (counted in examples) with a mean of the batches' means."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_chat_rows(13, seed=8))
    forms: list[tuple[int, dict[str, Any]]] = [
        (1, WITHOUT_PACKING["examples"]),
        (2, {**WITHOUT_PACKING[unit], "micro_batch_size": 2}),
        (1, PACKED[unit]),
        (2, PACKED[unit]),
    ]
    losses = []
    for number, (ranks, form) in enumerate(forms):
        paths = make_run(tmp_path, *material, ranks=ranks, name=f"run-{number}", max_steps=1, held_out=held_out, **form)
        run_training(paths, ranks)
        losses.append(next(record["eval_loss"] for record in read_lines(paths.metrics) if "eval_loss" in record))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


@pytest.mark.parametrize("unit", PACKED)
def test_trap_20_packing_changes_nothing_that_a_step_holds(
    unit: str, tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Examples, tokens, targets and losses of every step. Seen to fail (counted in examples) with a batch of 8 packed
    rows."""
    runs = {}
    for name, settings in (("packed", PACKED[unit]), ("padded", WITHOUT_PACKING[unit])):
        runs[name] = make_run(tmp_path, *material, ranks=1, name=name, max_steps=4, **settings)
        run_training(runs[name], 1)
    assert counts(runs["packed"]) == counts(runs["padded"])
    assert curve(runs["packed"])[0] == pytest.approx(curve(runs["padded"])[0], rel=1e-5)


def counts(paths: RunPaths) -> list[tuple[int, int, int]]:
    """(examples so far, tokens, supervised tokens) of each step."""
    steps = [record for record in read_lines(paths.metrics) if "loss" in record]
    return [(record["consumed_examples"], record["tokens"], record["supervised_tokens"]) for record in steps]
