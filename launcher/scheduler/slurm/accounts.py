"""What sacct says of the time and the GPUs that jobs have used. The parser is total: no text makes it raise."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.contract.job import JobId
from launcher.contract.job_state import JobState
from launcher.scheduler.base import Allocation
from launcher.scheduler.slurm.parsers import token_in
from launcher.scheduler.slurm.states import from_slurm

_GPUS = re.compile(r"(?:^|,)gres/gpu(?P<kind>:[^=,]+)?=(?P<count>[0-9]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One start of a job."""

    job_id: str
    state: JobState
    start: float
    end: float | None
    seconds: float
    nodes: int
    gpus: int | None
    token: str

    def of(self, job: JobId) -> Allocation:
        """Return the record as one of `job`."""
        return Allocation(
            job=job,
            state=self.state,
            start=self.start,
            end=self.end,
            seconds=self.seconds,
            nodes=self.nodes,
            gpus=self.gpus,
        )


def parse_uses(text: str) -> Iterator[Use]:
    """Yield the starts in sacct's answer, which begins with a header. A job that has not started yet has none."""
    lines = text.splitlines()
    header = lines[0].split("|") if lines else []
    for line in lines[1:]:
        row = dict(zip(header, line.split("|", max(0, len(header) - 1)), strict=False))
        start, seconds = _time(row.get("Start", "")), row.get("ElapsedRaw", "")
        if start is None or not seconds.isdecimal():
            continue
        nodes = row.get("NNodes", "")
        yield Use(
            job_id=row.get("JobID", "").strip(),
            state=from_slurm(row.get("State", "")),
            start=start,
            end=_time(row.get("End", "")),
            seconds=float(seconds),
            nodes=int(nodes) if nodes.isdecimal() else 0,
            gpus=gpus_in(row.get("AllocTRES", "")),
            token=token_in(row.get("SubmitLine", "")),
        )


def gpus_in(resources: str) -> int | None:
    """Return the GPUs in `cpu=16,gres/gpu=8,gres/gpu:h100=8,node=1`, or None where none are tracked."""
    found = list(_GPUS.finditer(resources))
    plain = [int(match["count"]) for match in found if match["kind"] is None]
    kinds = [int(match["count"]) for match in found if match["kind"] is not None]
    return plain[0] if plain else sum(kinds) if kinds else None


def _time(text: str) -> float | None:
    """Return Slurm's local time in seconds since the epoch, or None for `Unknown`."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None
