"""What `sft bench` computes around its measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from launcher.contract.errors import ConfigError, TopologyError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import TopologySpec
from launcher.contract.topology import build_topology
from sft.__main__ import main
from sft.bench.automodel import run_automodel
from sft.bench.environment import contender_variables
from sft.bench.ours import BenchData, run_spec
from sft.bench.overlap import busy, exposed, union
from sft.bench.phases import PhaseTimers
from sft.bench.result import StepClock
from sft.bench.topology import micro_batch_rows, parse_topology, replica_size
from sft.bench.workload import Workload
from sft.data.batches.sampler import EMPTY_SLOT


def test_layouts_by_name() -> None:
    assert parse_topology("dp") == TopologySpec()
    assert parse_topology("dp8") == TopologySpec()
    assert parse_topology("tp2+sp") == TopologySpec(tensor_parallel=2, sequence_parallel=True)
    found = parse_topology("tp4+pp2+vp3+cp2")
    assert found == TopologySpec(tensor_parallel=4, pipeline_parallel=2, virtual_pipeline=3, context_parallel=2)
    assert replica_size(found) == 16
    with pytest.raises(TopologyError, match="'zp2' is not one of"):
        parse_topology("tp2+zp2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "zp2"], "error: --topology zp2: 'zp2' is not one of dp, tpN"),
        (["--shape", "1c"], "error: '1c' is not a known model size"),
        (["--fp8-experts"], "error: --fp8-experts needs --precision fp8"),
        (["--recompute-layers", "2"], "error: --recompute-layers needs --recompute full"),
        (
            ["--vs", "trl", "automodel", "--gpus", "2"],
            "error: --vs automodel: run on one GPU only, and --gpus is 2; add",
        ),
    ],
)
def test_wrong_words_end_it_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--gpus", "--rows", "--seq-length", "--steps", "--layers", "--micro-batches"])
def test_there_is_at_least_one_of_everything(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No GPU ended in a traceback, and no row in a rank that failed."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", option, "0"])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert "'0' is not a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "rows", "micro_batches", "expected"),
    [("dp", 8, 1, 8), ("dp", 8, 2, 4), ("dp", 1, 4, 1), ("tp2+sp", 4, 1, 8), ("pp2", 8, 1, 2), ("pp2", 2, 1, 1)],
)
def test_rows_of_a_micro_batch(layout: str, rows: int, micro_batches: int, expected: int) -> None:
    """A GPU's rows times the GPUs of a model, cut; a pipeline of two has eight micro-batches if there are as many."""
    assert micro_batch_rows(parse_topology(layout), rows, micro_batches) == expected


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [(1, None, "0"), (2, None, "0,1"), (1, "3,5", "3"), (2, "GPU-ab, GPU-cd,GPU-ef", "GPU-ab,GPU-cd"), (2, "", "")],
)
def test_a_contender_sees_its_own_gpus_alone(gpus: int, visible: str | None, expected: str) -> None:
    """TRL on one GPU of several would wrap its model in torch's DataParallel."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert contender_variables(gpus, "dp", environ)["CUDA_VISIBLE_DEVICES"] == expected


def contenders_that(do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of contenders do something else, and fail."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{do}\nexit 3\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr("sft.commands.bench.sys.executable", str(interpreter))


def test_the_processes_of_a_contender_have_these_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders_that('echo "rank $RANK of $WORLD_SIZE sees $CUDA_VISIBLE_DEVICES"', tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    assert main(["bench", "--vs", "trl", "--gpus", "1", "2", "--vs-parallel", "ddp"]) == ExitCode.FAILURE
    told = [line for line in capsys.readouterr().out.splitlines() if " sees " in line]
    assert told == 2 * ["rank 0 of 1 sees 5"] + 2 * ["rank 0 of 2 sees 5,6"]


def test_other_trainers_get_their_own_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CUDA graphs are a choice of torchtitan's alone, which also runs on several GPUs; unsloth runs on one."""
    contenders_that('echo "request on $WORLD_SIZE:" $(cat "$3")', tmp_path, monkeypatch)
    peers = ["--vs", "torchtitan", "unsloth", "--vs-cuda-graphs", "never", "always"]
    assert main(["bench", *peers, "--gpus", "1", "2"]) == ExitCode.FAILURE
    told = [line.split(":", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("request on ")]
    found = [
        (ranks.removeprefix("request on "), request["contender"], request["settings"].get("graphs"))
        for ranks, request in ((ranks, json.loads(text)) for ranks, text in told)
    ]
    titan = [("torchtitan", "never"), ("torchtitan", "always")]
    assert found == [
        ("1", "ours", None), *[("1", *each) for each in titan], ("1", "unsloth", None),
        ("2", "ours", None), *[("2", *each) for each in titan],
    ]  # fmt: skip


@pytest.mark.slow  # a model with the vocabulary of a named shape, on a CPU
def test_our_contender_is_measured_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To try a command out: trainer, clock, phases and profiler run as on a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "result.json"
    size = ["--shape", "0.5b", "--layers", "1", "--rows", "1", "--seq-length", "64"]
    assert main(["bench", *size, "--warmup", "1", "--steps", "1", "--output", str(output)]) == ExitCode.OK
    (result,) = json.loads(output.read_text())["results"]
    assert (result["contender"], result["steps"]) == ("ours", 1)
    assert result["loss"] == pytest.approx(math.log(named_model_shape("0.5b").vocab_size), abs=0.5)
    assert result["step_ms"] == pytest.approx(sum(result["phases_ms"].values()), rel=0.2)
    assert result["breakdown_ms"] == {}, "the profiler saw kernels of a GPU"


def test_more_gpus_than_are_visible_are_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus 2: CUDA_VISIBLE_DEVICES names only 1"):
        contender_variables(2, "dp", {"CUDA_VISIBLE_DEVICES": "3"})


@pytest.mark.parametrize(("layout", "queues"), [("dp", "32"), ("tp2+sp", "1"), ("pp2", "1")])
def test_model_parallel_contenders_have_one_hardware_queue(layout: str, queues: str) -> None:
    assert contender_variables(2, layout, {})["CUDA_DEVICE_MAX_CONNECTIONS"] == queues


@pytest.mark.parametrize("layout", ["dp", "tp2+sp", "pp2", "tp2+cp2"])
def test_no_example_comes_twice(layout: str) -> None:
    """A step has the rows of each GPU, however many of them train one replica."""
    workload, steps = Workload(shape="0.5b", data="ragged", seq_length=512, rows=2), 5
    spec = run_spec(workload, Path("model"), 4, parse_topology(layout), {}, 1, steps)
    data = BenchData(workload, spec, build_topology(spec, workload.model_shape), steps)
    slots = [slot for step in range(steps) for slot in data.schedule.examples_at(step).tolist()]
    ids = [slot for slot in slots if slot != EMPTY_SLOT]
    assert len(ids) == len(set(ids))
    assert sum(data.examples.lengths[ids]) > 0.9 * steps * 4 * workload.rows * workload.seq_length


def test_fewer_layers_are_the_first_ones() -> None:
    shape = Workload(shape="qwen3.5-4b", data="full", seq_length=512, rows=1, layers=6).model_shape
    assert (shape.num_layers, shape.linear_layers) == (6, (0, 1, 2, 4, 5))


def test_automodel_is_refused_what_it_cannot_train_here() -> None:
    for workload in (
        Workload(shape="1b", data="ragged", seq_length=512, rows=2),
        Workload(shape="1b", data="full", seq_length=512, rows=2, lora_rank=8),
    ):
        with pytest.raises(ValueError, match="automodel is run on `--data full` without LoRA"):
            run_automodel(workload, micro_batches=1, warmup=1, steps=1)


def test_exposed_communication() -> None:
    computing = [(0.0, 4.0), (3.0, 5.0), (10.0, 12.0)]
    assert union(computing) == [(0.0, 5.0), (10.0, 12.0)]
    assert busy(computing) == 7.0
    assert exposed([], computing) == 0.0
    assert exposed([(1.0, 2.0)], computing) == 0.0
    assert exposed([(4.0, 11.0)], computing) == 5.0
    assert exposed([(4.0, 7.0), (6.0, 8.0), (12.0, 13.0)], computing) == 4.0


def test_only_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the warm-up nor what a trainer does after its last step."""
    now = iter([10.0, 11.0])
    monkeypatch.setattr("sft.bench.result.time.perf_counter", lambda: next(now))
    monkeypatch.setattr("sft.bench.result.torch.cuda.is_available", lambda: False)
    clock = StepClock(warmup=1, steps=2)
    for _ in range(2):
        clock.before_step()
        clock.after_step([60, 30], slots=100, supervised=50)
    with pytest.raises(RuntimeError, match="1 steps were timed, not 2"):
        clock.result("ours", {}, named_model_shape("1b"), 0.0)
    clock.before_step()
    clock.after_step([70, 40], slots=120, supervised=60)
    found = clock.result("ours", {}, named_model_shape("1b"), 0.0)  # a third look at the clock would raise
    assert (found.step_ms, found.real_tokens_per_second, found.slots_per_second) == (500.0, 200.0, 220.0)
    adapted = clock.result("ours", {}, named_model_shape("1b"), 0.0, lora_rank=16)
    assert (found.tflops, adapted.tflops) == (1.5, 1.0)  # 6 operations a weight and token, and 4 for frozen ones


def test_phases_are_milliseconds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.bench.phases.torch.cuda.is_available", lambda: False)
    clock = iter([0.0, 0.1, 0.4, 0.4, 0.9, 1.0, 1.5, 2.0])
    monkeypatch.setattr("sft.bench.phases.time.perf_counter", lambda: next(clock))
    timers = PhaseTimers()
    timers("step").start()
    timers("forward-compute", log_level=2).start()
    timers("forward-compute").stop()
    timers("optimizer").start()
    timers("optimizer").stop()
    timers("step").stop()
    timers("of no interest").start()
    assert timers.milliseconds(2, whole=510.0) == {"forward": 150.0, "optimizer": 250.0, "other": 100.0, "data": 10.0}
    timers.reset()
    assert timers.milliseconds(2, whole=0.0) == {"other": 0.0, "data": 0.0}
