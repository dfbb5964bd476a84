"""A checkpoint is read by another version of Megatron-core, or refused with the reason.

Needs a second version beside the installed one: `pip install --no-deps --target DIR megatron-core==...`, and DIR in
SFT_OTHER_MEGATRON.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths
from launcher.contract.versions import parse_version
from sft.megatron.core import __version__
from tests.parity.runs import curve, make_run
from tests.tiny_model import make_material

OTHER = os.environ.get("SFT_OTHER_MEGATRON", "")
COMMON_MOVED = parse_version("0.19")
"""From this version on, what is not a tensor is in the sharded files, where earlier ones do not look for it."""

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not OTHER, reason="SFT_OTHER_MEGATRON names no second version of Megatron-core"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 36)


def train(paths: RunPaths, *, other: bool) -> tuple[int, str]:
    """Train a run of one rank in a process of its own, with one of the two versions; exit code and output."""
    checkout = str(Path(__file__).parents[2])
    path = os.pathsep.join([checkout, OTHER] if other else [checkout])
    command = [sys.executable, "-m", "sft", "train", str(paths.config)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout + done.stderr


def other_version() -> tuple[int, ...]:
    (metadata,) = Path(OTHER).glob("megatron_core-*.dist-info")
    return parse_version(metadata.name.removeprefix("megatron_core-"))


@pytest.mark.parametrize("other_first", [True, False], ids=["read here", "read there"])
def test_a_checkpoint_of_another_version(other_first: bool, tmp_path: Path, material: tuple[Path, Path]) -> None:
    settings: dict[str, Any] = {"ranks": 1, "max_steps": 4, "every": 2, "keep_last": 9}
    whole = make_run(tmp_path, *material, name="whole", **settings)
    code, output = train(whole, other=other_first)
    assert code == ExitCode.OK, output
    resumed = make_run(tmp_path, *material, name="resumed", **settings)
    shutil.copytree(whole.checkpoint(2), resumed.checkpoint(2))
    shutil.copy(whole.metrics, resumed.metrics)
    code, output = train(resumed, other=not other_first)
    own = parse_version(__version__)
    writer, reader = (other_version(), own) if other_first else (own, other_version())
    if writer >= COMMON_MOVED > reader:
        assert code == ExitCode.IO_ERROR, output
        assert "; install megatron-core>=0.19 for the ranks" in output
        return
    assert code == ExitCode.OK, output
    assert curve(resumed)[0] == pytest.approx(curve(whole)[0], rel=1e-5)
