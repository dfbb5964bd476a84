"""Gathers of updated weights that come late change no number: whoever uses a weight has waited for it.

Between CPU ranks a gather has finished so soon that a forgotten wait can go unseen. Here what other ranks update is NaN
from the end of the backward pass until somebody waits for its gather.

Seen to fail without each `await_weights` in FusedRMSNorm, FusedMLP (but for fp8, which needs a GPU) and the LM head,
and without `gather_weights` before a checkpoint is saved or prompts are answered. Before an evaluation nothing fails
without it: the evaluation's forward passes wait like those of training.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sft.engine.module
import sft.megatron.layers.fused
import sft.megatron.model
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, checkpoint_step, read_lines
from launcher.contract.spec import EvaluationSpec
from sft.commands.export import export
from sft.megatron.core import DistributedDataParallelConfig
from sft.training.trainer import train
from tests.parity.runs import curve, make_run, run_training
from tests.ranks import RankFailure, run_ranks
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

CELLS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: (ranks, topology, other settings); chunks behind the first have one bucket, as Megatron-core decides
    "dp2": (2, {}, {}),
    "dp2_tied": (2, {}, {}),
    "dp2_in_between": (2, {}, {"max_steps": 5, "every": 3, "eval_every": 2, "keep_last": 9}),
    "dp2_answers": (2, {}, {"eval_every": 2}),
    "tp2_sp_dp2": (4, {"tensor_parallel": 2, "sequence_parallel": True}, {}),
    "pp2_dp2": (4, {"pipeline_parallel": 2}, {}),
    "vpp2_dp2": (4, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {}),
}
WAITS = {
    "norms": (sft.megatron.layers.fused, "FusedRMSNorm"),
    "mlp_up": (sft.megatron.layers.fused, "ColumnParallelLinear"),
    "mlp_down": (sft.megatron.layers.fused, "RowParallelLinear"),
    "lm_head": (sft.megatron.model, "ColumnParallelLinear"),
}
"""Who calls `await_weights`, and for what."""


def train_late(config: Path, forgotten: str | None = None) -> ExitCode:
    """Runs on a rank: training with late gathers of single weights; `forgotten` is one of WAITS."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    sft.engine.module.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=1)  # type: ignore[attr-defined]
    delay(_ParamAndGradBucketGroup)
    if forgotten is not None:
        forget(*WAITS[forgotten])
    return train(config)


def delay(groups: Any) -> None:
    """Let Megatron-core's groups of buckets hold what they gather once it was waited for, and NaN before."""
    start, finish_grads = groups.start_param_sync, groups.finish_grad_sync

    def start_late(self: Any, force_sync: bool = False) -> None:
        start(self, force_sync)
        if self.param_gather_handle is not None:
            self.param_gather_handle = LateGather(self)

    def finish_and_lose(self: Any, *args: Any, **kwargs: Any) -> None:
        finish_grads(self, *args, **kwargs)
        if self.ddp_config.overlap_param_gather:
            lose_weights_of_others(self)

    groups.start_param_sync, groups.finish_grad_sync = start_late, finish_and_lose


class LateGather:
    """Handle of a gather whose data land when it is waited for."""

    def __init__(self, group: Any) -> None:
        group.param_gather_handle.wait()
        self._landing = [(bucket.param_data, bucket.param_data.clone()) for bucket in group.buckets]
        lose_weights_of_others(group)

    def wait(self) -> None:
        for place, gathered in self._landing:
            place.copy_(gathered)


def lose_weights_of_others(group: Any) -> None:
    """NaN in place of the weights that other data parallel ranks update."""
    for bucket in group.buckets:
        shards = bucket.param_data.chunk(group.intra_distributed_optimizer_instance_size)
        for rank, shard in enumerate(shards):
            if rank != group.intra_distributed_optimizer_instance_rank:
                shard.fill_(math.nan)


def forget(caller: Any, kind: str) -> None:
    """Let a module of the project wait no more for weights of modules of this kind."""
    wait = caller.await_weights
    caller.await_weights = lambda module: None if type(module).__name__ == kind else wait(module)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    rows = make_chat_rows(48, seed=3)
    return {
        "model": make_tiny_model(root / "model"),
        "tied": make_tiny_model(root / "tied", tied=True, family="qwen3"),
        "chat": write_jsonl(root / "chat.jsonl", rows[:40]),
        "held_out": write_jsonl(root / "held-out.jsonl", rows[40:]),
        "prompts": write_jsonl(root / "prompts.jsonl", [{"prompt": "How many otters?"}]),
    }


def run(root: Path, data: dict[str, Path], cell: str, **settings: Any) -> RunPaths:
    ranks, topology, own = CELLS[cell]
    model = data["tied" if cell == "dp2_tied" else "model"]
    given: dict[str, Any] = {"kernels": "fused", "max_steps": 3, **own, **settings}
    if cell == "dp2_in_between":
        given["held_out"] = data["held_out"]
    if cell == "dp2_answers":
        # One prompt: the other replica answers none, and has to take part in the gathers all the same.
        given["evaluation"] = EvaluationSpec(prompts=str(data["prompts"]), max_new_tokens=8)
    return make_run(root, model, data["chat"], ranks=ranks, topology=topology, **given)


def weights(paths: RunPaths, step: int) -> dict[str, torch.Tensor]:
    """What the checkpoint of a step holds."""
    assert export(paths.root, step) == ExitCode.OK
    return load_file(paths.export / "model.safetensors")


def told(paths: RunPaths) -> tuple[list[float], list[str]]:
    """Held-out losses and answers, in order."""
    losses = [line["eval_loss"] for line in read_lines(paths.metrics) if "eval_loss" in line]
    return losses, [line["output"] for line in read_lines(paths.generations)]


@pytest.mark.parametrize("cell", thinned(CELLS, "dp2_in_between", "tp2_sp_dp2"))
def test_late_gathers_change_no_number(cell: str, tmp_path: Path, data: dict[str, Path]) -> None:
    ranks = CELLS[cell][0]
    whole = run(tmp_path, data, cell, name="whole", overlap=False)
    run_training(whole, ranks)
    late = run(tmp_path, data, cell, name="late", overlap=True)
    assert run_ranks(ranks, train_late, late.config) == [ExitCode.OK] * ranks
    for found, expected, rel in zip(curve(late), curve(whole), (1e-5, 1e-4), strict=True):
        assert found == pytest.approx(expected, rel=rel)
    (losses, answers), (expected_losses, expected_answers) = told(late), told(whole)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert answers == expected_answers
    assert (bool(losses), bool(answers)) == (cell == "dp2_in_between", cell == "dp2_answers")
    for step in (checkpoint_step(path) for path in whole.complete_checkpoints()):
        torch.testing.assert_close(weights(late, step), weights(whole, step), rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", thinned(WAITS, "lm_head"))
def test_a_forgotten_wait_is_seen(place: str, tmp_path: Path, data: dict[str, Path]) -> None:
    """In the first step already: Megatron-core gathers the initial weights, too."""
    paths = run(tmp_path, data, "dp2", overlap=True, max_steps=1)
    with pytest.raises(RankFailure, match="stopped after step 1: a bad step"):
        run_ranks(2, train_late, paths.config, place)
