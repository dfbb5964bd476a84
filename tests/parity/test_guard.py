"""Steps with NaN, infinity or a spike: their update is never applied, and what follows is the configured policy."""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sft.engine.module
import sft.megatron.optim.optimizer
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, checkpoint_step, read_lines
from launcher.contract.spec import read_resolved
from sft.__main__ import main
from sft.data.batches.sampler import ExampleSchedule
from sft.data.prepared.prepare import open_or_build
from tests.parity.runs import curve, make_run, run_training
from tests.ranks import RankFailure, run_ranks
from tests.tiny_model import make_material

pytestmark = pytest.mark.parity

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one_rank": (1, {}, {}),
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "dp2_distributed": (2, {}, {"distributed": True}),
    "pp2_plain_optimizer": (2, {"pipeline_parallel": 2}, {"distributed": False}),
    "bf16": (1, {}, {"precision": "bf16"}),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 36)


def train_with_bad_steps(config: Path, factor: float, first: int, last: int) -> tuple[int, list[str]]:
    """Runs on a rank: loss weights times `factor` in steps first..last; exit code, and state before each step."""
    states: list[str] = []
    training_step = sft.engine.module.SFTGPT.training_step

    def poisoned(self: sft.engine.module.SFTGPT, batch: Any, batch_idx: int) -> None:
        states.append(digest(self))
        if first <= batch_idx + 1 <= last:
            parts = [replace(part, loss_weights=part.loss_weights * factor) for part in batch.micro_batches]
            batch = replace(batch, micro_batches=tuple(parts))
        training_step(self, batch, batch_idx)

    sft.engine.module.SFTGPT.training_step = poisoned  # type: ignore[method-assign]
    code = main(["train", str(config)])
    return code, states


def digest(module: sft.engine.module.SFTGPT) -> str:
    """Weights, master weights, moments and step counts of this rank, as one hash."""
    found = hashlib.sha256()
    tensors = list(module.parameters())
    for inner in sft.megatron.optim.optimizer.torch_optimizers(module.megatron_optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                tensors += [param, *inner.state[param].values()]
    for tensor in tensors:
        found.update(tensor.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", LAYOUTS)
def test_bad_step_changes_nothing_but_the_count(name: str, tmp_path: Path, material: tuple[Path, Path]) -> None:
    """With `found_inf` left unset, or with gradients multiplied by 0, the weights are NaN from then on."""
    ranks, topology, settings = LAYOUTS[name]
    settings = {"on_bad_step": "skip", "max_steps": 5, **settings}
    paths = make_run(tmp_path, *material, ranks=ranks, topology=topology, **settings)
    for code, states in run_ranks(ranks, train_with_bad_steps, paths.config, float("nan"), 3, 3):
        assert code == ExitCode.OK
        assert states[3] == states[2]
        assert len(set(states)) == 4
    losses, norms = curve(paths)
    assert [loss == loss for loss in losses] == [True, True, False, True, True]
    assert [norm == norm for norm in norms] == [True, True, False, True, True]
    (record,) = read_lines(paths.bad_steps)
    assert (record["step"], record["reason"], record["loss"]) == (3, "not finite", None)
    assert record["examples"] == examples_of_step(paths, material[0], 2)
    assert [event["policy"] for event in events(paths, "bad_step")] == ["skip"]


def examples_of_step(paths: RunPaths, model: Path, step: int) -> list[int]:
    spec = read_resolved(paths.config)
    cache = open_or_build(spec, model, build=False).train
    schedule = ExampleSchedule(num_examples=len(cache), global_batch_size=8, seed=spec.train.seed, shuffle=True)
    return schedule.examples_at(step).tolist()


def test_infinite_gradient_is_a_bad_step(tmp_path: Path, material: tuple[Path, Path]) -> None:
    paths = make_run(tmp_path, *material, ranks=1, on_bad_step="skip", max_steps=3)
    ((code, states),) = run_ranks(1, train_with_bad_steps, paths.config, 1e38, 2, 2)
    assert code == ExitCode.OK
    assert states[2] == states[1]


def test_stop_saves_and_a_resubmit_goes_on(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """The verdict is read one step later, so the checkpoint is of step 4."""
    paths = make_run(tmp_path, *material, ranks=2, max_steps=6)
    results = run_ranks(2, train_with_bad_steps, paths.config, float("nan"), 3, 3)
    assert [code for code, _ in results] == [ExitCode.FAILURE] * 2
    assert paths.complete_checkpoints() == [paths.checkpoint(4)]
    run_training(paths, 2)
    assert len(curve(paths)[0]) == 6


def test_bad_last_step_is_seen(tmp_path: Path, material: tuple[Path, Path]) -> None:
    paths = make_run(tmp_path, *material, ranks=1, max_steps=3)
    ((code, _),) = run_ranks(1, train_with_bad_steps, paths.config, float("nan"), 3, 3)
    assert code == ExitCode.FAILURE
    assert [record["step"] for record in read_lines(paths.bad_steps)] == [3]


def test_rewind_takes_back_the_weights_and_not_the_data(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """The verdict on step 4 is read after step 5: both are left out, and step 6 begins with the weights of step 3."""
    settings = {"on_bad_step": "rewind", "every": 3, "keep_last": 9, "max_steps": 7}
    paths = make_run(tmp_path, *material, ranks=2, topology={"tensor_parallel": 2}, **settings)
    for code, states in run_ranks(2, train_with_bad_steps, paths.config, float("nan"), 4, 4):
        assert code == ExitCode.OK
        assert states[5] == states[3]
        assert states[6] != states[5]
    assert [(event["step"], event["checkpoint"]) for event in events(paths, "rewound")] == [(5, "step-00000003")]
    assert [record["step"] for record in read_lines(paths.metrics)] == list(range(1, 8))


def test_a_save_waits_for_the_verdict_on_its_step(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """Seen to fail: step 4 was saved before it was known to be bad, and step 2, the only one before it, removed."""
    settings = {"on_bad_step": "rewind", "every": 2, "keep_last": 1, "max_steps": 5}
    paths = make_run(tmp_path, *material, ranks=1, **settings)
    ((code, states),) = run_ranks(1, train_with_bad_steps, paths.config, float("nan"), 4, 4)
    assert code == ExitCode.OK
    assert states[4] == states[2] != states[3]
    assert [(event["step"], event["checkpoint"]) for event in events(paths, "rewound")] == [(4, "step-00000002")]


def test_a_restart_goes_on_from_the_weights_of_a_rewind(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """Seen to fail: killed after the rewind at step 5, the run went on from the checkpoint of step 3, with examples
    that the rewind had left out."""
    settings: dict[str, Any] = {"on_bad_step": "rewind", "every": 3, "keep_last": 9, "max_steps": 7}
    whole = make_run(tmp_path, *material, ranks=1, name="whole", **settings)
    run_ranks(1, train_with_bad_steps, whole.config, float("nan"), 4, 4)
    paths = make_run(tmp_path, *material, ranks=1, **settings)
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(1, train_until_killed, paths.config, 4, 6)
    assert [checkpoint_step(path) for path in paths.complete_checkpoints()] == [3, 5]
    run_training(paths, 1)
    ends = [[(line["step"], line["loss"]) for line in read_lines(run.metrics)][5:] for run in (whole, paths)]
    assert ends[0] == ends[1]
    assert [step for step, _ in ends[0]] == [6, 7]


@pytest.mark.parametrize(("policy", "ends"), [("stop", ExitCode.FAILURE), ("rewind", ExitCode.REQUEUE)])
def test_a_bad_step_that_is_the_last_before_a_stop_is_followed_by_the_policy(
    policy: str, ends: ExitCode, tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Seen to fail: with either policy the attempt asked to go on as another one, after the bad step."""
    paths = make_run(tmp_path, *material, ranks=1, on_bad_step=policy, every=2, max_steps=6)
    assert run_ranks(1, train_until_asked, paths.config, 3) == [ends]
    assert paths.complete_checkpoints()[-1] == paths.checkpoint(3)
    assert [event["step"] for event in events(paths, "rewound")] == [3] * (policy == "rewind")


def train_until_asked(config: Path, step: int) -> int:
    """Runs on a rank: a step with NaN, during which the rank is asked to stop."""
    training_step = sft.engine.module.SFTGPT.training_step

    def asked(self: sft.engine.module.SFTGPT, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == step:
            os.kill(os.getpid(), signal.SIGUSR2)
        training_step(self, batch, batch_idx)

    sft.engine.module.SFTGPT.training_step = asked  # type: ignore[method-assign]
    code, _ = train_with_bad_steps(config, float("nan"), step, step)
    return code


def train_until_killed(config: Path, bad: int, killed: int) -> None:
    """Runs on a rank: a step with NaN, and the end of the process as the other one begins."""
    training_step = sft.engine.module.SFTGPT.training_step

    def dying(self: sft.engine.module.SFTGPT, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == killed:
            os._exit(1)
        training_step(self, batch, batch_idx)

    sft.engine.module.SFTGPT.training_step = dying  # type: ignore[method-assign]
    train_with_bad_steps(config, float("nan"), bad, bad)


def test_rewind_without_a_checkpoint_leaves_the_step_out(tmp_path: Path, material: tuple[Path, Path]) -> None:
    paths = make_run(tmp_path, *material, ranks=1, max_steps=4, on_bad_step="rewind")
    ((code, states),) = run_ranks(1, train_with_bad_steps, paths.config, float("nan"), 2, 2)
    assert code == ExitCode.OK
    assert states[2] == states[1]
    assert events(paths, "rewound") == []


def test_ten_bad_steps_in_a_row_end_the_run(tmp_path: Path, material: tuple[Path, Path]) -> None:
    paths = make_run(tmp_path, *material, ranks=1, max_steps=20, on_bad_step="skip")
    ((code, states),) = run_ranks(1, train_with_bad_steps, paths.config, float("nan"), 3, 20)
    assert code == ExitCode.FAILURE
    assert len(states) == 12
    assert len(list(read_lines(paths.bad_steps))) == 10


def test_spike_is_measured_against_the_mean_of_good_steps(tmp_path: Path, material: tuple[Path, Path]) -> None:
    settings = {"on_bad_step": "skip", "spike_factor": 20.0, "max_steps": 16, "lr": 1e-4}
    paths = make_run(tmp_path, *material, ranks=1, **settings)
    ((code, states),) = run_ranks(1, train_with_bad_steps, paths.config, 1000.0, 14, 14)
    assert code == ExitCode.OK
    assert states[14] == states[13]
    (record,) = read_lines(paths.bad_steps)
    assert (record["step"], record["reason"]) == (14, "spike")
    assert torch.isfinite(torch.tensor(curve(paths)[1])).all()


def test_resume_with_spike_guard_is_bitwise(tmp_path: Path, material: tuple[Path, Path]) -> None:
    import shutil

    settings: dict[str, Any] = {
        "on_bad_step": "skip",
        "spike_factor": 1.01,
        "max_steps": 16,
        "every": 12,
        "keep_last": 9,
    }
    settings["lr"] = 1e-5
    full = make_run(tmp_path, *material, ranks=1, name="full", **settings)
    run_training(full, 1)
    assert len(list(read_lines(full.bad_steps))) > 0  # else the running mean would not matter
    paths = make_run(tmp_path, *material, ranks=1, name="resumed", **settings)
    shutil.copytree(full.checkpoint(12), paths.checkpoint(12))
    shutil.copy(full.metrics, paths.metrics)
    run_training(paths, 1)
    assert curve(paths) == curve(full)


def events(paths: RunPaths, name: str) -> list[dict[str, Any]]:
    """Events of one kind, in order."""
    return [record for record in read_lines(paths.events) if record["event"] == name]
