"""Tokenize data files into the parts of a cache, in several processes.

A worker gets byte ranges and writes parts, so no process ever holds more than one range. The result does not depend on
the number of workers. Small data sets are tokenized in this process, which is faster than starting another.

Bad rows are collected before the error is raised: the first ones in the order of the files, whichever worker met them.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.contract.errors import DataError, LauncherError
from launcher.contract.spec import DataSpec
from sft.data.cache.progress import Progress
from sft.data.cache.store import Counts, Part, Tallies, TokenPair, write_part
from sft.data.encoding.length_policy import fit
from sft.data.encoding.masking import Encoded, Encoder
from sft.data.encoding.tokenizer import load_tokenizer
from sft.data.reading.files import ByteRange, cut, read_lines
from sft.data.reading.formats import parse_row
from sft.data.reading.split import Split
from sft.data.reading.tables import holds_lines, write_lines

MAX_PROBLEMS = 5
RANGE_BYTES = 4 << 20
"""Size of the ranges, some seconds of work each; data smaller than this is not worth a second process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every worker is given once."""

    tokenizer_dir: Path
    data: DataSpec
    """With the format and the columns of the rows."""
    split: Split | None = None
    """Which rows are taken; None takes all."""


@dataclass(frozen=True, slots=True)
class Result:
    """A written part, or the first problems in its rows."""

    part: Part
    problems: tuple[str, ...]


class Worker:
    """Tokenizes byte ranges. Each process has one."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder = Encoder(load_tokenizer(job.tokenizer_dir), job.data)

    def run(self, work: tuple[ByteRange, Path]) -> Result:
        """Tokenize one range and write its part, empty if a row has a problem."""
        rows, prefix = work
        tally: Counter[str] = Counter()
        tallies = Tallies()
        pairs: list[TokenPair] = []
        problems: list[str] = []
        split = self._job.split
        for number, line in read_lines(rows):
            if split is not None and not split.takes(line):
                continue
            try:
                encoded = self._encode(line, rows.where(number), tally, tallies)
            except DataError as error:
                problems += error.problems
                if len(problems) >= MAX_PROBLEMS:
                    break
            else:
                pairs += encoded
        part = write_part(prefix, [] if problems else pairs, Counts(**tally), tallies)
        return Result(part, tuple(problems[:MAX_PROBLEMS]))

    def _encode(self, line: bytes, where: str, tally: Counter[str], tallies: Tallies) -> list[TokenPair]:
        """Return what is trained of one row.

        Add to `tally`, whose keys are the fields of `Counts`, and to `tallies`.
        """
        data = self._job.data
        example = parse_row(line, where, data.format, data.columns, data.ignore_keys)
        examples = self._encoder.encode(example)
        tallies.unread.update((*example.unread, *self._encoder.unread(example)))
        tallies.columns.update(example.columns)
        tally["rows"] += 1
        tally["rewritten"] += len(examples) > 1
        tally["escaped"] += any(encoded.escaped for encoded in examples)
        kept: list[Encoded] = []
        for encoded in examples:
            try:
                pieces = fit(encoded, self._job.data, tally)
            except DataError as error:
                raise DataError([f"{where}: {problem}" for problem in error.problems]) from error
            tally["straddling"] += encoded.straddling
            tally["messages_trimmed"] += encoded.unused
            tally["answers"] += encoded.answers if pieces else 0
            kept += pieces
        for piece in kept:
            terminators = piece.ids[piece.ends & (piece.weights != 0)]
            tally["terminators"] += len(terminators)
            tallies.answer_ends.update(terminators.tolist())
        return [(piece.ids, piece.weights) for piece in kept]


def write_parts(job: Job, files: Sequence[Path], aside: Path, *, show_progress: bool, title: str) -> list[Part]:
    """Tokenize `files` and return the parts, written to directory `aside` in the order of the rows.

    Raise DataError with the first problems.
    """
    lines = [(path, None) if holds_lines(path) else (_written_out(path, aside), path) for path in files]
    total = sum(path.stat().st_size for path, _ in lines)
    workers = min(job.data.workers or len(os.sched_getaffinity(0)), -(-total // RANGE_BYTES))
    # Several ranges for each worker, so that none of them is idle for long at the end.
    size = max(min(RANGE_BYTES, total // (4 * max(workers, 1))), 1 << 16)
    ranges = [rows for path, source in lines for rows in cut(path, size, source)]
    work = [(rows, aside / f"part-{index:06d}") for index, rows in enumerate(ranges)]
    parts: list[Part] = []
    with Progress(title, total, shown=show_progress) as progress:
        for rows, result in zip(ranges, _run(job, work, workers), strict=True):
            if result.problems:
                raise DataError(result.problems)
            parts.append(result.part)
            progress.advance(rows.end - rows.start)
    for path, source in lines:
        if source is not None:
            path.unlink()
    return parts


def _written_out(path: Path, aside: Path) -> Path:
    """Write the rows of a file that does not hold lines as lines, and return the path of that new file."""
    number = sum(1 for _ in aside.glob("rows-*"))
    target = aside / f"rows-{number:06d}"
    write_lines(path, target)
    return target


def _run(job: Job, work: Iterable[tuple[ByteRange, Path]], workers: int) -> Iterator[Result]:
    """Yield the results in the order of `work`."""
    if workers < 2:
        yield from map(Worker(job).run, work)
        return
    # Spawned: a fork of a process in which torch or a tokenizer has started threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=partial(_start_worker, job))
    try:
        yield from pool.map(_run_in_worker, work)
    except BrokenProcessPool as error:
        raise LauncherError(
            f"one of {workers} tokenizing processes died; if memory ran out, set data.workers to fewer"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None


def _start_worker(job: Job) -> None:
    global _worker
    # The tokenizer's own threads would compete with the other workers for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Worker(job)


def _run_in_worker(work: tuple[ByteRange, Path]) -> Result:
    assert _worker is not None, "the pool's initializer makes it"
    return _worker.run(work)
