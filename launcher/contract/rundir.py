"""Every file of a run directory has its name here, and every write to one goes through here.

    RUN/
      config.yaml           the resolved config: what every rank runs
      run.lock.yaml         the same with what its files held and which code it had; `submit` makes a new run of it
      bundle/code/          the code that the ranks run, as it was at submit; environment.json: Python and packages
      job.sh                the batch script, exactly as submitted; runs again by hand
      submission.json       a submission that was begun and is not recorded yet
      manifest.json         who submitted what, when, from which code; one entry an attempt
      source.diff           uncommitted changes of the source tree at submit
      events.jsonl          what happened, one JSON object a line (launcher, batch script, rank 0)
      metrics.jsonl         one line a logged step
      progress.json         the newest numbers, replaced as a whole
      lease.json            who may write here now (launcher/contract/lease.py)
      logs/<attempt>/       batch.log and rank-<N>.log; of the first rank that failed error.json; of a hang
                            stacks-rank-<N>.txt and hang.json
      preflight/<attempt>.json  what each node found before training
      checkpoints/step-<N>/ complete when it holds COMPLETE
      bad_steps.jsonl       steps whose update was not applied, with the ids of their examples
      generations.jsonl     answers given during training
      export/               Hugging Face directory
      nemo_log_globalrank-0_localrank-0.txt  the log of NeMo's logger, where logging.nemo is set
      export_nemo2/         the same as a NeMo 2 checkpoint, where `sft export --format nemo2` was asked for
      loss.png              the loss curve

Whole files are written aside, synced and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JsonObject = dict[str, Any]
"""A record as it is in a JSON file. Its values are whatever the file holds: check them where they are used."""

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names that are safe as a directory, a Slurm job name and a word in a script."""

_STEP_DIR = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of the run in `root`."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name, which is its directory's."""
        return self.root.name

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def lock(self) -> Path:
        return self.root / "run.lock.yaml"

    @property
    def code(self) -> Path:
        """Copy of the code, first on the PYTHONPATH of every rank."""
        return self.root / "bundle" / "code"

    @property
    def environment(self) -> Path:
        return self.root / "bundle" / "environment.json"

    @property
    def script(self) -> Path:
        return self.root / "job.sh"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def submission(self) -> Path:
        return self.root / "submission.json"

    @property
    def source_diff(self) -> Path:
        return self.root / "source.diff"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        return self.root / "progress.json"

    @property
    def lease(self) -> Path:
        return self.root / "lease.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def nemo_log(self) -> Path:
        return self.root / "nemo_log_globalrank-0_localrank-0.txt"

    @property
    def export_nemo2(self) -> Path:
        return self.root / "export_nemo2"

    @property
    def loss_plot(self) -> Path:
        return self.root / "loss.png"

    @property
    def bad_steps(self) -> Path:
        return self.root / "bad_steps.jsonl"

    @property
    def generations(self) -> Path:
        return self.root / "generations.jsonl"

    @property
    def samples(self) -> Path:
        """Answers before and after training."""
        return self.root / "samples.jsonl"

    def rank_log(self, attempt: str, rank: int) -> Path:
        """Log of one rank in one attempt."""
        return self.logs / attempt / f"rank-{rank}.log"

    def stacks(self, attempt: str, rank: int) -> Path:
        """Where the threads of a rank stood when the attempt hung."""
        return self.logs / attempt / f"stacks-rank-{rank}.txt"

    def preflight(self, attempt: str) -> Path:
        """What the nodes of an attempt found before training."""
        return self.root / "preflight" / f"{attempt}.json"

    def error(self, attempt: str) -> Path:
        """What the first rank that failed says of its error."""
        return self.logs / attempt / "error.json"

    def failure(self, attempt: str) -> Path:
        """Exit code, rank and host of the first rank that failed, as the process that started it saw it."""
        return self.logs / attempt / "failure"

    def checkpoint(self, step: int) -> Path:
        """Checkpoint directory of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def complete_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.checkpoints)


COMPLETE = "COMPLETE"
"""Marker file that is written last into a checkpoint directory."""


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in `directory` that carry the marker, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _STEP_DIR.fullmatch(path.name) and (path / COMPLETE).is_file()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Step number in a checkpoint directory's name."""
    match = _STEP_DIR.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named step-<N>")
    return int(match.group(1))


def write_atomic(path: Path, text: str, mode: int | None = None) -> None:
    """Replace `path` by `text`: written beside it, synced, renamed. `mode` defaults to what the umask gives."""
    import tempfile  # loads random and hashlib, which a command that only reads need not wait for

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _umask_mode() if mode is None else mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_path(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace `path` by `value` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any | None:
    """Content of a JSON file, or None where it is absent."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def append_event(paths: RunPaths, event: str, **fields: object) -> None:
    """Add one line to events.jsonl; a single write, so lines of several writers do not mix."""
    append_line(paths.events, {"time": time.time(), "event": event, **fields})


def append_line(path: Path, record: JsonObject) -> None:
    """Append `record` as one JSON line."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read_lines(path: Path) -> Iterator[JsonObject]:
    """Yield the records of a JSON-lines file; a line that a crash cut short is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def sync_path(path: Path) -> None:
    """Make the bytes of a file, or what was renamed in a directory, outlive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
