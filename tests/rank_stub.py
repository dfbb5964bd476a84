"""Ranks for tests that look at a run from outside: they answer `launcher stacks` as real ones do, and only wait."""

from __future__ import annotations

import sys
from pathlib import Path

_RANK = """\
import os, sys, time
from pathlib import Path
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import WatchdogSpec
from sft.health.stack_answers import answering
from sft.health.watchdog import Watchdog
from sft.runtime.rank_env import RankEnv

def waits():
    while not (here / "go-on").exists():
        time.sleep(0.1)

def behind():
    waits()

here, paths, env = Path(sys.argv[0]).parent, RunPaths(Path(sys.argv[1]).parent), RankEnv.from_environ()
watchdog = Watchdog(WatchdogSpec(), paths, env)
with watchdog, answering(paths.root, env, watchdog.place):
    (here / f"ready-{env.rank}").touch()
    behind() if env.rank == 1 else waits()
"""


def rank_stub(folder: Path) -> str:
    """Return the override that starts such ranks. They touch `folder`/ready-RANK, and end when go-on is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rank.py").write_text(_RANK)
    python = folder / "python"
    steps = f'[ "$2" = sft ] || exec {sys.executable} "$@"\n[ "$3" = train ] || exit 0\n'
    python.write_text(f'#!/bin/bash\n{steps}exec {sys.executable} {folder}/rank.py "$4"\n')
    python.chmod(0o755)
    return f"cluster.runtime.python={python}"
