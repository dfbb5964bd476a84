"""What to set where sbatch refuses a job."""

from __future__ import annotations

import pytest

from launcher.scheduler.slurm.refusals import advice
from tests.launcher.conftest import Commands


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "Batch job submission failed: Invalid account or account/partition combination specified",
            "\nset resources.account to one of chemistry, physics",
        ),
        ("Batch job submission failed: Invalid qos specification", "\nset resources.qos"),
        ("Batch job submission failed: Requested time limit is invalid", "\nset resources.time"),
        ("Batch job submission failed: Unspecified error", ""),
    ],
)
def test_advice(commands: Commands, said: str, line: str) -> None:
    commands.add("sacctmgr", "echo physics; echo chemistry; echo physics")
    assert advice(said) == line


def test_without_accounting_the_key_alone_is_named(commands: Commands) -> None:
    commands.add("sacctmgr", "echo no >&2; exit 1")
    assert advice("Invalid account") == "\nset resources.account"
