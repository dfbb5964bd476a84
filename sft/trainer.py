"""Build a Lightning trainer that runs SFTGPT under a topology, and run it.

`megatron_trainer` is the one place that says how Lightning is set up: no sampler, precision plugin, gradient clipping,
progress bar or checkpoint callback of its own, because Megatron-core or this package does each of these.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytorch_lightning as pl
import torch

from launcher.errors import CheckpointError, ConfigError
from launcher.exit_codes import ExitCode
from launcher.rundir import RunPaths, checkpoint_step, complete_checkpoints, read_lines, write_atomic
from launcher.spec import RunSpec, read_resolved
from launcher.topology import Topology, build_topology, describe_batch
from sft.callbacks import CheckpointCallback, EvaluationCallback, ProgressCallback, RunLog
from sft.checkpoint import newest_usable
from sft.data.datamodule import SFTDataModule
from sft.data.prepare import open_or_build
from sft.hf.architecture import read_architecture
from sft.hf.model_files import resolve_model_dir
from sft.module import SFTGPT
from sft.plot import plot_loss
from sft.rank_env import RankClusterEnvironment, RankEnv
from sft.stop import StopFlag
from sft.strategy import MegatronStrategy


def megatron_trainer(
    spec: RunSpec,
    topology: Topology,
    env: RankEnv,
    *,
    max_steps: int,
    data_key: str,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """A trainer for SFTGPT on this rank: process groups and checkpoints by MegatronStrategy, CPU or GPU."""
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
            strategy=MegatronStrategy(topology, spec.train.seed, data_key),
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


def train(config: Path) -> ExitCode:
    """Train the run whose resolved config is `config`, from its newest complete checkpoint if it has one.

    Called on every rank. OK when all steps are done, REQUEUE when asked to stop before.
    """
    spec, paths, env = read_resolved(config), RunPaths(config.resolve().parent), RankEnv.from_environ()
    stop = StopFlag()
    stop.install()
    leader = env.rank == 0
    model_dir = resolve_model_dir(spec, convert=False)
    architecture = read_architecture(model_dir)
    topology = build_topology(spec, architecture.shape)
    tokenizer_dir = Path(spec.model.tokenizer) if spec.model.tokenizer else model_dir
    data = SFTDataModule(spec, topology, open_or_build(spec, tokenizer_dir, build=leader))
    max_steps = data.max_steps
    log = RunLog(paths, spec, attempt=env.attempt, max_steps=max_steps, is_writer=leader)
    resume = _resume_point(spec, paths)
    begin = checkpoint_step(resume) if resume else 0
    if begin >= max_steps:
        log.say(f"all {max_steps} steps are done ({resume}); nothing to train")
        return ExitCode.OK
    callbacks: list[pl.Callback] = [ProgressCallback(log, data.plan.consumed_examples)]
    held_out = data.validation_batches()
    if held_out is not None:
        callbacks.append(EvaluationCallback(held_out, spec.train.eval_every, log, max_steps))
    callbacks.append(CheckpointCallback(paths, spec, stop, log, max_steps))
    trainer = megatron_trainer(spec, topology, env, max_steps=max_steps, data_key=data.data_key, callbacks=callbacks)
    module = SFTGPT(spec, architecture, topology, model_dir, max_steps)
    if leader:
        _drop_metrics_after(paths, begin)
    log.say(f"{topology.describe()}; {describe_batch(spec, topology)}")
    log.say(f"resuming after step {begin} from {resume}" if resume else f"starting from {model_dir}")
    log.event("training_started", step=begin, max_steps=max_steps)
    began = time.monotonic()
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    # srun ends all ranks when one exits other than 0: none may leave while another is still writing.
    cast(MegatronStrategy, trainer.strategy).control.barrier()
    if trainer.global_step < max_steps:
        return ExitCode.REQUEUE
    log.event("training_finished", step=max_steps, seconds=round(time.monotonic() - began, 1))
    if leader and spec.logging.plot:
        plot_loss(paths)
    return ExitCode.OK


def _resume_point(spec: RunSpec, paths: RunPaths) -> Path | None:
    """This run's newest usable checkpoint, else the configured one of another run."""
    own = newest_usable(paths.complete_checkpoints())
    if own is not None or spec.checkpoint.resume_from is None:
        return own
    given = Path(spec.checkpoint.resume_from)
    if given not in complete_checkpoints(given.parent):
        raise CheckpointError(f"checkpoint.resume_from: {given} is not a complete checkpoint (no COMPLETE file in it)")
    return given


def _drop_metrics_after(paths: RunPaths, step: int) -> None:
    """Forget metrics of steps that an earlier attempt did after its last checkpoint: they are done again now."""
    import json

    kept = [record for record in read_lines(paths.metrics) if record["step"] <= step]
    write_atomic(paths.metrics, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
