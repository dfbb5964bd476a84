"""Record the first error of an attempt as data, for the restart policy and `status --why`.

Only the first rank that fails writes it: the others mostly fail because it did.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from launcher.contract.rundir import RunPaths
from sft.runtime.rank_env import node_name

_LONGEST_MESSAGE = 2000


def record_error(path: Path, error: BaseException) -> None:
    """Write logs/<attempt>/error.json, unless another rank has. `path` is the run directory or its config.

    Does nothing if the directory does not exist or cannot be written to: the error itself is in the log.
    """
    root = path.resolve()
    paths = RunPaths(root if root.is_dir() else root.parent)
    record = {
        "rank": int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0),
        "host": node_name(),
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "message": str(error)[:_LONGEST_MESSAGE],
    }
    target = paths.error(os.environ.get("SFT_ATTEMPT") or "by-hand")
    with contextlib.suppress(OSError), target.open("x", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
