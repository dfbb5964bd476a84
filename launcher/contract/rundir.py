"""Names and formats of the files in a run directory, and the functions that read and write them.

    RUN/
      config.yaml           the resolved config that every rank runs
      run.lock.yaml         the same with fingerprints of its files and its code; `submit` makes a new run of it
      bundle/code.zip       a copy of the code at submit, which the ranks import; environment.json: Python and packages
      job.sh                the batch script, exactly as submitted; runs again by hand
      submission.json       a submission that has begun and is not recorded yet
      candidates/<name>/    config.yaml and job.sh of each cluster or partition of a race (`submit --first-of`)
      winner.json           which of them has started first, and so has the run
      manifest.json         who submitted what, when, from which code, with an entry for each job
      source.diff           uncommitted changes of the source tree at submit
      events.jsonl          what happened, one JSON object a line (launcher, batch script, rank 0)
      metrics.jsonl         one line a logged step
      metrics.prom          the newest numbers for Prometheus (metrics.prometheus: true)
      progress.json         the newest numbers, replaced as a whole
      lease.json            who may write here now (launcher/contract/lease.py)
      logs/<attempt>/       batch.log and rank-<N>.log; error.json of the first rank that failed; after a hang
                            stacks-rank-<N>.txt and hang.json
      preflight/<attempt>.json  what each node found before training
      checkpoints/step-<N>/ a checkpoint, complete when it contains COMPLETE
      bad_steps.jsonl       steps whose update was not applied, with the ids of their examples
      stop_tokens.json      the tokens that end answers in the training data
      chat_template.jinja   the template of data.chat_template as the data were written with it
      generations.jsonl     answers given during training
      export/               Hugging Face directory
      export_nemo2/         the same as a NeMo 2 checkpoint (`sft export --format nemo2`)
      nemo_log_globalrank-0_localrank-0.txt  the log of NeMo's logger (logging.nemo)
      loss.png              the loss curve

Whole files are written to a temporary file, synced and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import errno
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
        """The run's name, which is that of its directory."""
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
        return self.root / "bundle" / "code.zip"

    @property
    def loose_code(self) -> Path:
        """The same as a folder, in runs that an earlier version has made."""
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
    def candidates(self) -> Path:
        return self.root / "candidates"

    @property
    def winner(self) -> Path:
        return self.root / "winner.json"

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
    def prometheus(self) -> Path:
        return self.root / "metrics.prom"

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
    def stop_tokens(self) -> Path:
        """The tokens that end answers in the training data."""
        return self.root / "stop_tokens.json"

    @property
    def chat_template(self) -> Path:
        """The template of data.chat_template as the data were written with it."""
        return self.root / "chat_template.jinja"

    @property
    def samples(self) -> Path:
        """Answers before and after training."""
        return self.root / "samples.jsonl"

    def rank_log(self, attempt: str, rank: int) -> Path:
        """Log of one rank in one attempt."""
        return self.logs / attempt / f"rank-{rank}.log"

    def stacks(self, attempt: str, rank: int) -> Path:
        """Return the file with the stacks of a rank's threads at the time of a hang."""
        return self.logs / attempt / f"stacks-rank-{rank}.txt"

    def preflight(self, attempt: str) -> Path:
        """Return the file with what the nodes of an attempt found before training."""
        return self.root / "preflight" / f"{attempt}.json"

    def error(self, attempt: str) -> Path:
        """Return the file with the error of the first rank that failed, in its own words."""
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


def default_run_root() -> Path:
    """Return the folder in which runs are looked up when nothing else is said."""
    return Path(os.environ.get("SFT_RUN_ROOT") or "runs")


def named_run(place: Path) -> Path:
    """Return the directory of the run that has this name where runs are looked up, or the path itself."""
    of_name = default_run_root() / place
    return of_name if not place.exists() and RunPaths(of_name).config.is_file() else place


def group_file(run_root: Path, name: str) -> Path:
    """Return where the sweep `name` lists its runs and what was set in each."""
    return run_root / ".groups" / f"{name}.json"


def runs_of_group(run_root: Path, name: str) -> list[str]:
    """Return the names of the runs of a sweep, or none where `name` is no sweep."""
    values = None if "/" in name else read_json(group_file(run_root, name))
    return list(values["points"]) if values else []


COMPLETE = "COMPLETE"
"""Marker file that is written last into a checkpoint directory."""


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest first."""
    return [path for path in step_folders(directory) if (path / COMPLETE).is_file()]


def step_folders(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, oldest first, those without a marker as well: damage has taken it."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _STEP_DIR.fullmatch(path.name)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return the step in the name of a checkpoint's directory."""
    match = _STEP_DIR.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named step-<N>")
    return int(match.group(1))


def write_atomic(path: Path, content: str | bytes, mode: int | None = None) -> None:
    """Replace the file `path` by `content`, whole or not at all. By default its mode follows the umask."""
    import tempfile  # late: it loads random and hashlib, for which a command that only reads need not wait

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
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
    """Return the content of a JSON file, or None if it is absent. ValueError where it holds something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def append_event(paths: RunPaths, event: str, **fields: object) -> None:
    """Add one line to events.jsonl."""
    append_line(paths.events, {"time": time.time(), "event": event, **fields})


def append_line(path: Path, record: JsonObject) -> None:
    """Append `record` as one JSON line, by a single write, so that lines of several writers do not mix.

    A torn line that a crash or a full disk left at the end is closed first, or it would swallow this one.
    """
    # A file name or an error can hold half a surrogate pair, which UTF-8 has no bytes for; JSON has an escape.
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(handle, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def read_lines(path: Path) -> Iterator[JsonObject]:
    """Yield the records of a JSON-lines file, without lines that are no JSON objects, as a crash leaves them."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = record_in(line)
            if record is not None:
                yield record


def record_in(line: str) -> JsonObject | None:
    """Return the JSON object in a line, or the last one where it was glued to torn ones, or None."""
    begins = (0, line.rfind('{"time"'), line.rfind('{"step"'))  # as lines of events and metrics begin
    for begin in (place for place in begins if place >= 0):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line[begin:])
            if isinstance(record, dict):
                return record
    return None


def sync_path(path: Path) -> None:
    """Flush a file, or the renames in a directory, to disk, so that they outlive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
