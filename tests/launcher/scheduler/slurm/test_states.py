"""Slurm's states, translated into ours."""

from __future__ import annotations

import pytest

from launcher.contract.job_state import JobState
from launcher.scheduler.slurm.states import SLURM_STATES, from_slurm


@pytest.mark.parametrize("name", SLURM_STATES)
def test_long_name_and_compact_code_agree(name: str) -> None:
    code, state = SLURM_STATES[name]
    assert from_slurm(name) is from_slurm(code) is from_slurm(name.lower()) is state


def test_compact_codes_are_distinct() -> None:
    assert len({code for code, _ in SLURM_STATES.values()}) == len(SLURM_STATES)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("CANCELLED by 1185300516", JobState.CANCELLED),
        ("CANCELLED+", JobState.CANCELLED),
        ("OUT_OF_ME+", JobState.OUT_OF_MEMORY),
        ("CONFIGUR", JobState.PENDING),
        ("NODE_FAI", JobState.NODE_FAIL),
        ("REQUEUE_", JobState.UNKNOWN),  # _FED or _HOLD
        ("REQUEUE_HOLD", JobState.HELD),
        ("SPECIAL_EXIT", JobState.HELD),
        ("STOPPED", JobState.SUSPENDED),
        ("COMPLET", JobState.UNKNOWN),  # COMPLETED or COMPLETING
        ("RUNING", JobState.UNKNOWN),
        ("", JobState.UNKNOWN),
        ("SOMETHING_NEW", JobState.UNKNOWN),
    ],
)
def test_words_of_slurm(text: str, state: JobState) -> None:
    assert from_slurm(text) is state


def test_every_state_is_active_terminal_or_unknown() -> None:
    assert [state for state in JobState if not state.active and not state.terminal] == [JobState.UNKNOWN]
    assert not [state for state in JobState if state.active and state.terminal]
