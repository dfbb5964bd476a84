"""Build a Lightning trainer that runs SFTGPT under a topology, and run it.

`megatron_trainer` is the only place that sets up Lightning: without its sampler, precision plugin, gradient clipping,
progress bar and checkpoint callback, because Megatron-core or this package does each of these.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from launcher.contract.copy_folder import remove_stale_copies
from launcher.contract.errors import CheckpointError, ConfigError, TrainingError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.lease import Keeper, held
from launcher.contract.rundir import RunPaths, checkpoint_step, complete_checkpoints, step_folders
from launcher.contract.spec import RunSpec, read_resolved
from launcher.contract.topology import Topology, build_topology, describe_batch
from sft.checkpoint.files import damage
from sft.checkpoint.load import newest_usable, read_trainer_state
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
from sft.models.registry import read_architecture
from sft.runtime import lightning as pl
from sft.runtime.deadline import Deadline
from sft.runtime.rank_env import RankEnv
from sft.runtime.start_clock import StartClock
from sft.runtime.stop import StopFlag
from sft.training.callbacks.bad_steps import GuardCallback
from sft.training.callbacks.checkpoints import CheckpointCallback
from sft.training.callbacks.copies import CopyCallback
from sft.training.callbacks.early_stopping import EarlyStopping
from sft.training.callbacks.evaluation import EvaluationCallback, held_out_batches
from sft.training.callbacks.progress import ProgressCallback
from sft.training.callbacks.startup import StartupCallback
from sft.training.callbacks.watchdog_marks import watched
from sft.training.cluster_environment import RankClusterEnvironment
from sft.training.copy_start import resume_point_with_copies
from sft.training.datamodule import SFTDataModule
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
        return _train(spec, paths, env, stop, lease, watchdog, metric, clock)


def _train(
    spec: RunSpec,
    paths: RunPaths,
    env: RankEnv,
    stop: StopFlag,
    lease: Keeper | None,
    watchdog: Watchdog,
    metric: Metric | None,
    clock: StartClock,
) -> ExitCode:
    """Train while this attempt holds the run. `lease` is None on all ranks but the first."""
    leader = env.rank == 0
    model_dir = resolve_model_dir(spec, convert=False)
    architecture = read_architecture(model_dir)
    topology = build_topology(spec, architecture.shape)
    tokenizer_dir = Path(spec.model.tokenizer) if spec.model.tokenizer else model_dir
    prepared = open_or_build(spec, tokenizer_dir, build=leader)
    data = SFTDataModule(spec, topology, prepared)
    held_out = held_out_batches(spec, topology, data, tokenizer_dir, build=leader)
    mfu = utilization(spec, architecture.shape, topology.world_size)
    log = RunLog(
        paths,
        spec,
        attempt=env.attempt,
        max_steps=data.max_steps,
        is_writer=leader,
        utilization=mfu,
        may_write=lease.confirm if lease is not None else None,
    )
    resume = _resume_point(spec, paths)
    done = _nothing_to_do(spec, resume, data.max_steps)
    if done and resume is not None and resume.parent != paths.checkpoints:
        raise ConfigError(
            f"checkpoint.resume_from {resume}: {done}, so that this run would train nothing and have no checkpoint to "
            "export; raise train.max_steps, train.epochs or train.early_stopping.patience"
        )
    if done:
        log.say(f"{done} ({resume}); nothing to train")
        return ExitCode.OK
    answers = None
    if spec.evaluation.prompts:
        stops = prepared.stop_tokens
        answers = PromptAnswers(spec, tokenizer_dir, model_dir, log, trained_stops=stops, metric=metric)
    evaluation = EvaluationCallback(spec, held_out, answers, log)
    guard = GuardCallback(spec, log, data.example_ids)
    progress = ProgressCallback(log, data.schedule.consumed_examples)
    # Their order matters at each step boundary: each uses the results of those before it.
    deadline = Deadline.from_environ(spec.resources.signal_seconds)
    saves = CheckpointCallback(spec, stop, deadline, lease, evaluation, guard, log)
    callbacks = [StartupCallback(clock, log, env.attempt), progress, guard, evaluation, saves]
    if spec.checkpoint.copy_every is not None:
        callbacks.append(CopyCallback(spec.checkpoint, env.attempt, log))
    steps, key = data.max_steps, data.data_key
    trainer = megatron_trainer(
        spec, topology, env, max_steps=steps, data_key=key, callbacks=watched(callbacks, watchdog), clock=clock
    )
    strategy = cast(MegatronStrategy, trainer.strategy)
    clock.end("data")
    if spec.checkpoint.copy_every is not None:
        resume = resume_point_with_copies(strategy, resume, paths, env, architecture, log)
    module = SFTGPT(spec, architecture, topology, model_dir, steps, resumes=resume is not None)
    stages = f"; stages of {topology.describe_stages()}" if topology.pipeline_parallel > 1 else ""
    log.say(f"{topology.describe()}{stages}; {describe_batch(spec, topology)}")
    log.say(choose_kernels(spec, architecture, on_gpu=spec.resources.gpus_per_node > 0).describe())
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    # srun ends all ranks when one exits with another code than 0: none may exit while another is still writing.
    strategy.control.barrier()
    if strategy.copies is not None:
        strategy.copies.remove()
    return _finish(trainer.global_step, guard, evaluation, spec, log)


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


def _nothing_to_do(spec: RunSpec, resume: Path | None, max_steps: int) -> str | None:
    """Return why there is nothing left to train after this checkpoint, or None.

    Raise ConfigError for a number of steps that no config may have: earlier versions wrote no digest of config.yaml.
    """
    if max_steps < 1:
        raise ConfigError(f"train.max_steps {max_steps} in {spec.name}'s config.yaml is below 1: the file is damaged")
    if resume is None:
        return None
    if checkpoint_step(resume) >= max_steps:
        return f"all {max_steps} steps are done"
    try:
        early = EarlyStopping(spec, read_trainer_state(resume).early_stopping)
    except (CheckpointError, ValueError):  # the load looks at every byte, and says so or takes an older checkpoint
        return None
    return f"training ended early after step {checkpoint_step(resume)}" if early.is_due else None


def _resume_point(spec: RunSpec, paths: RunPaths) -> Path | None:
    """Return this run's newest usable checkpoint, else the one that checkpoint.resume_from names."""
    own = newest_usable(paths.complete_checkpoints())
    if own is None and (there := step_folders(paths.checkpoints)):
        raise CheckpointError(
            f"none of the {len(there)} checkpoints in {paths.checkpoints} can be used; of the newest, "
            f"{damage(there[-1])}. Remove them to start again"
        )
    if own is not None or spec.checkpoint.resume_from is None:
        return own
    given = Path(spec.checkpoint.resume_from)
    newest = newest_usable(complete_checkpoints(given))  # where a run's checkpoints folder is named
    if newest is not None:
        return newest
    if given not in complete_checkpoints(given.parent):
        raise CheckpointError(f"checkpoint.resume_from: {given} is not a complete checkpoint (no COMPLETE file in it)")
    return given
