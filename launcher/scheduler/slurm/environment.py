"""The environment for Slurm's commands, and so for jobs, without the variables of an enclosing job or a user's profile.

A job inherits its submitter's environment. Submitted from inside another job it would take that job's sizes for its
own: its node list, its task count, its GPUs. Variables such as SQUEUE_FORMAT and SLURM_TIME_FORMAT would change the
form of the answers that we parse.
"""

from __future__ import annotations

import os
from collections.abc import Collection

_PREFIXES = ("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_", "PMI")
_KEPT = ("SLURM_CONF", "SLURM_JWT")  # which cluster, and who we are there
_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GPU_DEVICE_ORDINAL")


def inherited() -> set[str]:
    """Return the names of our variables that belong to an enclosing job or steer Slurm's commands."""
    names = {name for name in os.environ if name.startswith(_PREFIXES) and name not in _KEPT}
    return names | {name for name in _DEVICES if name in os.environ and "SLURM_JOB_ID" in os.environ}


def clean_environment(without: Collection[str] = ()) -> dict[str, str]:
    """Return our environment without the `inherited` variables and those in `without`."""
    dropped = inherited() | set(without)
    return {name: value for name, value in os.environ.items() if name not in dropped}
