"""render --diff and submit --test-only show what would happen and change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.exit_codes import ExitCode
from tests.launcher.conftest import Commands


def changes(text: str) -> list[str]:
    return [line for line in text.splitlines()[2:] if line[:1] in "+-"]


def test_diff_against_a_run(workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    commands.add("srun", "")
    commands.add("sbatch", "echo 1")
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev"]) == 0
    capsys.readouterr()
    words = ["render", "cfg.yaml", "--cluster=slurm-dev", "--diff", "first"]
    assert main([*words, "name=other"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*words, "resources.time=10"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"--- {workdir}/runs/first/job.sh\n+++ cfg.yaml\n")
    assert changes(out) == ["-#SBATCH --time=1:30:00", "+#SBATCH --time=10"]
    assert main(["render", "cfg.yaml", "--diff", "first0"]) == ExitCode.CONFLICT
    assert "did you mean 'first'?" in capsys.readouterr().err


def test_diff_against_a_cluster(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "cfg.yaml", "--diff", "--cluster=slurm-dev"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- cfg.yaml on local\n+++ cfg.yaml on slurm-dev\n")
    assert "+#SBATCH --nodes=1" in changes(out)
    assert main(["render", "cfg.yaml", "--diff"]) == ExitCode.BAD_INPUT
    assert "name the RUN to compare with" in capsys.readouterr().err


def test_test_only(workdir: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    said = "Job 7 to start at 2026-11-24T20:50:00 using 2 processors on nodes node1 in partition main"
    commands.add("sbatch", f'cat >"$0.script"; echo "sbatch: {said}" >&2')
    before = sorted(workdir.rglob("*"))
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev", "--test-only"]) == 0
    assert capsys.readouterr().out.endswith(f"\nstart      {said}\n")
    assert commands.calls("sbatch") == ["--test-only"]
    assert (commands.folder / "sbatch.script").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=first\n")
    assert main(["submit", "cfg.yaml", "--test-only"]) == 0
    assert sorted(workdir.rglob("*")) == before
    commands.add("sbatch", "echo 'allocation failure: invalid partition' >&2; exit 1")
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev", "--test-only"]) == ExitCode.SCHEDULER
    assert "invalid partition" in capsys.readouterr().err
