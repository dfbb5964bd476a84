"""Where a run goes on from, and whether anything is left to do from there."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.errors import CheckpointError, ConfigError
from launcher.contract.rundir import RunPaths, checkpoint_step, complete_checkpoints, step_folders
from launcher.contract.spec import RunSpec
from sft.checkpoint.files import damage
from sft.checkpoint.load import newest_usable, read_trainer_state
from sft.training.callbacks.early_stopping import EarlyStopping


def resume_point(spec: RunSpec, paths: RunPaths) -> Path | None:
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


def nothing_to_do(spec: RunSpec, paths: RunPaths, resume: Path | None, max_steps: int) -> str | None:
    """Return why there is nothing left to train after this checkpoint, or None.

    Raise ConfigError where that is another run's checkpoint, and for a number of steps that no config may have:
    earlier versions wrote no digest of config.yaml.
    """
    if max_steps < 1:
        raise ConfigError(f"train.max_steps {max_steps} in {spec.name}'s config.yaml is below 1: the file is damaged")
    done = None if resume is None else _done_by(spec, resume, max_steps)
    if done and resume is not None and resume.parent != paths.checkpoints:
        raise ConfigError(
            f"checkpoint.resume_from {resume}: {done}, so that this run would train nothing and have no checkpoint to "
            "export; raise train.max_steps, train.epochs or train.early_stopping.patience"
        )
    return done


def _done_by(spec: RunSpec, checkpoint: Path, max_steps: int) -> str | None:
    """Return why a run that has come to this checkpoint is done, or None."""
    if checkpoint_step(checkpoint) >= max_steps:
        return f"all {max_steps} steps are done"
    try:
        early = EarlyStopping(spec, read_trainer_state(checkpoint).early_stopping)
    except (CheckpointError, ValueError):  # the load looks at every byte, and says so or takes an older checkpoint
        return None
    return f"training ended early after step {checkpoint_step(checkpoint)}" if early.is_due else None
