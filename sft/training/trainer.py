"""Build a Lightning trainer that runs SFTGPT under a topology, and run it.

`megatron_trainer` is the only place that sets up Lightning: without its sampler, precision plugin, gradient clipping,
progress bar and checkpoint callback, because Megatron-core or this package does each of these.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from launcher.contract.copy_folder import remove_stale_copies
from launcher.contract.errors import ConfigError, TrainingError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.lease import Keeper, held
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import RunSpec, read_resolved
from launcher.contract.topology import Topology, build_topology, describe_batch
from sft.data.prepared.prepare import open_or_build
from sft.engine.module import SFTGPT
from sft.generation.answers import PromptAnswers
from sft.generation.evaluation_prompts import Metric
from sft.health.stack_answers import answering
from sft.health.watchdog import Watchdog
from sft.megatron.kernel_choice import choose_kernels
from sft.metrics.loss_plot import plot_loss
from sft.metrics.mfu import utilization
from sft.metrics.run_log import RunLog
from sft.model_source import resolve_model_dir
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from sft.runtime import lightning as pl
from sft.runtime.deadline import Deadline
from sft.runtime.rank_env import RankEnv
from sft.runtime.start_clock import StartClock
from sft.runtime.stop import StopFlag
from sft.training.callbacks.bad_steps import GuardCallback
from sft.training.callbacks.checkpoints import CheckpointCallback
from sft.training.callbacks.copies import CopyCallback
from sft.training.callbacks.evaluation import EvaluationCallback, held_out_batches
from sft.training.callbacks.progress import ProgressCallback
from sft.training.callbacks.startup import StartupCallback
from sft.training.callbacks.watchdog_marks import watched
from sft.training.cluster_environment import RankClusterEnvironment
from sft.training.copy_start import resume_point_with_copies
from sft.training.datamodule import SFTDataModule, StepBatches
from sft.training.resume_point import nothing_to_do, resume_point
from sft.training.strategy import MegatronStrategy


def megatron_trainer(
    spec: RunSpec,
    topology: Topology,
    env: RankEnv,
    *,
    max_steps: int,
    data_key: Mapping[str, object],
    callbacks: Sequence[pl.Callback] = (),
    clock: StartClock | None = None,
) -> pl.Trainer:
    """Return a Lightning trainer for SFTGPT on this rank, on CPU or GPU as the config says.

    ConfigError where the config asks for GPUs and the rank sees none.
    """
    on_gpu = spec.resources.gpus_per_node > 0
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            f"resources.gpus_per_node is {spec.resources.gpus_per_node} and this rank sees no CUDA device; set it to 0 "
            "for CPU ranks, or check the cluster's runtime and GPU directive"
        )
    if spec.train.deterministic:
        torch.use_deterministic_algorithms(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        return pl.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=topology.ranks_per_node,
            num_nodes=spec.resources.nodes,
            strategy=MegatronStrategy(topology, spec.train.seed, data_key, clock),
            plugins=[RankClusterEnvironment(env)],
            callbacks=list(callbacks),
            max_steps=max_steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )


def train(config: Path, clock: StartClock | None = None) -> ExitCode:
    """Train the run whose resolved config is `config`, from its newest complete checkpoint if it has one.

    Every rank calls this. Returns OK when all steps are done or early stopping ended the run, REQUEUE when the run was
    asked to stop before that. `clock` has measured what happened before.
    """
    return train_run(read_resolved(config), RunPaths(config.resolve().parent), clock=clock)


def train_run(
    spec: RunSpec, paths: RunPaths, metric: Metric | None = None, clock: StartClock | None = None
) -> ExitCode:
    """Do what `train` does, for another program. `metric` replaces the function that evaluation.metric names."""
    clock = clock or StartClock()
    env = RankEnv.from_environ()
    stop = StopFlag()
    stop.install()
    holding = held(paths, env.attempt) if env.rank == 0 else contextlib.nullcontext()
    watchdog = Watchdog(spec.watchdog, paths, env)
    with holding as lease, watchdog, answering(paths.root, env, watchdog.place):
        if env.local_rank == 0:
            remove_stale_copies()
        return _train(_Attempt(spec, paths, env, stop, lease, watchdog, metric, clock))


@dataclass(frozen=True, slots=True)
class _Attempt:
    """An attempt that holds its run."""

    spec: RunSpec
    paths: RunPaths
    env: RankEnv
    stop: StopFlag
    lease: Keeper | None
    """None on all ranks but the first."""
    watchdog: Watchdog
    metric: Metric | None
    clock: StartClock

    @property
    def leads(self) -> bool:
        """Whether this rank builds and writes what all share."""
        return self.env.rank == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    """Model and data of a run, as this rank has them."""

    model_dir: Path
    tokenizer_dir: Path
    architecture: Architecture
    topology: Topology
    data: SFTDataModule
    held_out: Mapping[str, StepBatches]
    stop_tokens: Set[int]
    """Tokens that end answers, as the data were encoded."""

    @classmethod
    def open(cls, spec: RunSpec, *, build: bool) -> _Inputs:
        """Open them. `build` is for the rank that builds what `prepare` has not."""
        model_dir = resolve_model_dir(spec, convert=False)
        architecture = read_architecture(model_dir)
        topology = build_topology(spec, architecture.shape)
        tokenizer_dir = Path(spec.model.tokenizer) if spec.model.tokenizer else model_dir
        prepared = open_or_build(spec, tokenizer_dir, build=build)
        data = SFTDataModule(spec, topology, prepared)
        return cls(
            model_dir=model_dir,
            tokenizer_dir=tokenizer_dir,
            architecture=architecture,
            topology=topology,
            data=data,
            held_out=held_out_batches(spec, topology, data, tokenizer_dir, build=build),
            stop_tokens=prepared.stop_tokens,
        )


def _train(attempt: _Attempt) -> ExitCode:
    """Train while this attempt holds the run."""
    spec, paths, clock = attempt.spec, attempt.paths, attempt.clock
    inputs = _Inputs.open(spec, build=attempt.leads)
    topology, steps = inputs.topology, inputs.data.max_steps
    log = _run_log(attempt, inputs)
    resume = resume_point(spec, paths)
    done = nothing_to_do(spec, paths, resume, steps)
    if done is not None:
        log.say(f"{done} ({resume}); nothing to train")
        return ExitCode.OK
    evaluation = _evaluation(attempt, inputs, log)
    guard = GuardCallback(spec, log, inputs.data.example_ids)
    callbacks = watched(_callbacks(attempt, inputs, evaluation, guard, log), attempt.watchdog)
    key = inputs.data.data_key
    trainer = megatron_trainer(
        spec, topology, attempt.env, max_steps=steps, data_key=key, callbacks=callbacks, clock=clock
    )
    strategy = cast(MegatronStrategy, trainer.strategy)
    clock.end("data")
    if spec.checkpoint.copy_every is not None:
        resume = resume_point_with_copies(strategy, resume, paths, attempt.env, inputs.architecture, log)
    module = SFTGPT(spec, inputs.architecture, topology, inputs.model_dir, steps, resumes=resume is not None)
    _say_how(spec, inputs, log)
    trainer.fit(module, datamodule=inputs.data, ckpt_path=resume, weights_only=False)
    # srun ends all ranks when one exits with another code than 0: none may exit while another is still writing.
    strategy.control.barrier()
    if strategy.copies is not None:
        strategy.copies.remove()
    return _finish(trainer.global_step, guard, evaluation, spec, log)


def _run_log(attempt: _Attempt, inputs: _Inputs) -> RunLog:
    spec, lease = attempt.spec, attempt.lease
    return RunLog(
        attempt.paths,
        spec,
        attempt=attempt.env.attempt,
        max_steps=inputs.data.max_steps,
        is_writer=attempt.leads,
        utilization=utilization(spec, inputs.architecture.shape, inputs.topology.world_size),
        may_write=lease.confirm if lease is not None else None,
    )


def _evaluation(attempt: _Attempt, inputs: _Inputs, log: RunLog) -> EvaluationCallback:
    spec, answers = attempt.spec, None
    if spec.evaluation.prompts:
        stops, metric = inputs.stop_tokens, attempt.metric
        answers = PromptAnswers(spec, inputs.tokenizer_dir, inputs.model_dir, log, trained_stops=stops, metric=metric)
    return EvaluationCallback(spec, inputs.held_out, answers, log)


def _callbacks(
    attempt: _Attempt, inputs: _Inputs, evaluation: EvaluationCallback, guard: GuardCallback, log: RunLog
) -> list[pl.Callback]:
    """Return the callbacks in the order that matters at each step boundary: each uses results of those before it."""
    spec = attempt.spec
    deadline = Deadline.from_environ(spec.resources.signal_seconds)
    found: list[pl.Callback] = [
        StartupCallback(attempt.clock, log, attempt.env.attempt),
        ProgressCallback(log, inputs.data.schedule.consumed_examples),
        guard,
        evaluation,
        CheckpointCallback(spec, attempt.stop, deadline, attempt.lease, evaluation, guard, log),
    ]
    if spec.checkpoint.copy_every is not None:
        found.append(CopyCallback(spec.checkpoint, attempt.env.attempt, log))
    return found


def _say_how(spec: RunSpec, inputs: _Inputs, log: RunLog) -> None:
    """Say how ranks share the model, what a step holds, and which kernels compute it."""
    topology = inputs.topology
    stages = f"; stages of {topology.describe_stages()}" if topology.pipeline_parallel > 1 else ""
    log.say(f"{topology.describe()}{stages}; {describe_batch(spec, topology)}")
    log.say(choose_kernels(spec, inputs.architecture, on_gpu=spec.resources.gpus_per_node > 0).describe())


def _finish(step: int, guard: GuardCallback, evaluation: EvaluationCallback, spec: RunSpec, log: RunLog) -> ExitCode:
    """Log how the run ended and return its exit code, or raise TrainingError after bad steps."""
    log.close()
    if guard.failure is not None:
        raise TrainingError(f"stopped after step {step}: {guard.failure}; see {log.paths.bad_steps}")
    if step < log.max_steps and not evaluation.early_stopping.is_due:
        return ExitCode.REQUEUE
    log.event("training_finished", step=step, seconds=round(log.seconds, 1))
    if log.is_writer and spec.logging.plot:
        plot_loss(log.paths)
    return ExitCode.OK
