"""A rank that fails as a real one does as long as its config has what was seeded: `seeded_rank.py CONFIG`.

It stands in for `python -m sft train`, so that a failure costs no training: it reads the config, records its error and
exits as ranks do, and where nothing is wrong it writes a checkpoint.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from launcher.contract.errors import CheckpointError, LauncherError, UserCodeError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import COMPLETE, RunPaths, append_event
from launcher.contract.spec import RunSpec, read_resolved
from launcher.contract.time_limit import time_limit_minutes
from sft.runtime.error_record import record_error


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def train(spec: RunSpec, paths: RunPaths) -> int:
    """Raise what was seeded, or write a checkpoint. Return the exit code."""
    resume_from = spec.checkpoint.resume_from
    if spec.train.micro_batch_size > 1:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")
    if spec.evaluation.metric is not None:
        raise UserCodeError(f"evaluation.metric: {spec.evaluation.metric} raised ZeroDivisionError: division by zero")
    if spec.checkpoint.keep_last > 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths.checkpoints))
    if resume_from is not None and (Path(resume_from) / "damaged").exists():
        raise CheckpointError(f"checkpoint.resume_from: {resume_from} is damaged: sharded/__0_0.distcp is 0 bytes")
    if spec.resources.time is not None and (time_limit_minutes(spec.resources.time) or 0) < 5:
        append_event(paths, "stop_requested", attempt=os.environ["SFT_ATTEMPT"], step=1, signal=None, deadline=True)
        return int(ExitCode.REQUEUE)
    for step in (1, 2):
        paths.checkpoint(step).mkdir(parents=True, exist_ok=True)
        (paths.checkpoint(step) / COMPLETE).touch()
    return int(ExitCode.OK)


def main() -> int:
    """Run one rank; only the first one fails or writes anything."""
    config = Path(sys.argv[1])
    if os.environ.get("RANK", "0") != "0":
        return int(ExitCode.OK)
    try:
        return train(read_resolved(config), RunPaths(config.parent))
    except (LauncherError, RuntimeError, OSError) as error:
        record_error(config, error)
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, LauncherError):
            return int(error.exit_code)
        return int(ExitCode.IO_ERROR if isinstance(error, OSError) else ExitCode.FAILURE)


if __name__ == "__main__":
    sys.exit(main())
