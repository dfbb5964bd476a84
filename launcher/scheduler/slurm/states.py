"""Every state that Slurm can name, and which of our states it is.

The map is total: a word that is not in it is UNKNOWN, never success.
"""

from __future__ import annotations

from launcher.contract.job_state import JobState

SLURM_STATES: dict[str, tuple[str, JobState]] = {
    "BOOT_FAIL": ("BF", JobState.NODE_FAIL),
    "CANCELLED": ("CA", JobState.CANCELLED),
    "COMPLETED": ("CD", JobState.COMPLETED),
    "COMPLETING": ("CG", JobState.COMPLETING),
    "CONFIGURING": ("CF", JobState.PENDING),
    "DEADLINE": ("DL", JobState.TIMEOUT),
    "EXPEDITING": ("EX", JobState.PENDING),
    "FAILED": ("F", JobState.FAILED),
    "LAUNCH_FAILED": ("LF", JobState.FAILED),
    "NODE_FAIL": ("NF", JobState.NODE_FAIL),
    "OUT_OF_MEMORY": ("OOM", JobState.OUT_OF_MEMORY),
    "PENDING": ("PD", JobState.PENDING),
    "POWER_UP_NODE": ("PN", JobState.PENDING),
    "PREEMPTED": ("PR", JobState.PREEMPTED),
    "RECONFIG_FAIL": ("RE", JobState.FAILED),
    "REQUEUED": ("RQ", JobState.REQUEUED),
    "REQUEUE_FED": ("RF", JobState.REQUEUED),
    "REQUEUE_HOLD": ("RH", JobState.HELD),
    "RESIZING": ("RS", JobState.RUNNING),
    "RESV_DEL_HOLD": ("RD", JobState.HELD),
    "REVOKED": ("RV", JobState.CANCELLED),
    "RUNNING": ("R", JobState.RUNNING),
    "SIGNALING": ("SI", JobState.RUNNING),
    "SPECIAL_EXIT": ("SE", JobState.HELD),
    "STAGE_OUT": ("SO", JobState.COMPLETING),
    "STOPPED": ("ST", JobState.SUSPENDED),
    "SUSPENDED": ("S", JobState.SUSPENDED),
    "TIMEOUT": ("TO", JobState.TIMEOUT),
    "UPDATE_DB": ("UD", JobState.COMPLETING),
}
"""Slurm's long name → its compact code and our state."""

_BY_CODE = dict(SLURM_STATES.values())
_SHORTEST_CUT = 7  # squeue's tables cut after 8 letters, sacct's after 9 and a `+`


def from_slurm(text: str) -> JobState:
    """Return our state for Slurm's: written in full, compact, truncated by a table, or `CANCELLED by 1000`."""
    word = (text.split() or [""])[0].rstrip("+*").upper()
    if word in SLURM_STATES:
        return SLURM_STATES[word][1]
    if word in _BY_CODE:
        return _BY_CODE[word]
    meant = [state for name, (_, state) in SLURM_STATES.items() if len(word) >= _SHORTEST_CUT and name.startswith(word)]
    return meant[0] if len(meant) == 1 else JobState.UNKNOWN
