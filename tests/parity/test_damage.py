"""Damage any file of a run or of its cache, and start the run again.

It may end in two ways: with the numbers of the run that nobody damaged, bit by bit, or with a sentence and the exit
code of what is wrong. It never trains something else, and no command that reads the run ends in a traceback.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sft.data.reading.files
from launcher.contract.errors import LauncherError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job import Job
from launcher.contract.manifest import Manifest, write_manifest
from launcher.contract.records import read_metrics
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import read_resolved, sealed
from launcher.runs.listing import listing
from launcher.runs.state import collect
from launcher.views.report import write_report
from launcher.views.why import explain
from sft.__main__ import main
from tests.parity.runs import make_run
from tests.ranks import run_ranks
from tests.tiny_model import make_material

pytestmark = pytest.mark.parity

STEPS, KEPT = 6, 4
REFUSALS = {ExitCode.BAD_INPUT, ExitCode.CONFLICT, ExitCode.IO_ERROR}


def start(config: Path) -> list[int]:
    """The exit codes of what a batch script starts, up to the first that is not 0."""
    sft.data.reading.files._SETTLED_SECONDS = 0  # digests of files this new are not noted otherwise
    codes: list[int] = []
    for command in ("prepare", "train"):
        codes.append(main([command, str(config)]))
        if codes[-1]:
            break
    return codes


@dataclass(frozen=True)
class Trial:
    """A run that was stopped after step 4, as often as it is asked for, and what it must log when it goes on."""

    whole: Path
    folder: Path
    losses: dict[int, float]

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.folder / "run")

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.whole, self.folder)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    material = make_material(tmp_path_factory.mktemp("material"), 36, tied=True)
    folder = tmp_path_factory.mktemp("damaged") / "runs"
    paths = make_run(folder, *material, ranks=1, max_steps=STEPS, every=2, keep_last=9, min_free_gb=0)
    paths.config.write_text(sealed(read_resolved(paths.config)))
    job = Job.from_json({"job_id": "1", "scheduler": "local", "submitted_at": 1.0})
    facts: dict[str, Any] = {"submitter": "me", "host": "here", "command": ("launcher",), "versions": {}, "source": {}}
    topology = {"summary": "1 rank"}
    write_manifest(paths, Manifest(name="run", created_at=1.0, topology=topology, jobs=(job,), **facts))
    assert run_ranks(1, start, paths.config) == [[0, 0]]
    losses = {line["step"]: line["loss"] for line in read_metrics(paths) if "loss" in line}
    assert list(losses) == list(range(1, STEPS + 1))
    shutil.rmtree(paths.checkpoint(STEPS))
    paths.metrics.write_text("".join(paths.metrics.read_text().splitlines(keepends=True)[:KEPT]))
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    yield Trial(whole, folder, losses)


def flip(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def zero_a_block(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    size = min(chance.choice((1, 64, 4096)), len(content) - at)
    return content[:at] + bytes(size) + content[at + size :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": flip,
    "cut": lambda content, chance: content[: chance.randrange(len(content))],
    "emptied": lambda content, chance: b"",
    "zeroed": lambda content, chance: bytes(len(content)),
    "block": zero_a_block,
    "replaced": lambda content, chance: chance.choice(
        [b"{}", b"[]", b"5", b"null", b'"x"', b"[" * 100_000, b"\xff\xfe"]
    ),
    "grown": lambda content, chance: content + chance.choice([b"\n", b"\x00", b"garbage", content]),
}

TARGETS = {
    "config": "run/config.yaml",
    "marker": "run/checkpoints/*/COMPLETE",
    "trainer": "run/checkpoints/*/trainer.json",
    "tensors": "run/checkpoints/*/sharded/*",
    "records": "run/*.jsonl",
    "json": "run/*.json",
    "arrays": ".cache/tokens/*/*.npy",
    "manifest": ".cache/tokens/*/manifest.json",
    "digests": ".cache/digests/*.json",
}


def damage(trial: Trial, target: str, chance: random.Random) -> str:
    """Damage one of the target's files, and return how."""
    trial.restore()
    files = [path for path in sorted(trial.folder.glob(TARGETS[target])) if path.is_file() and path.stat().st_size]
    path = chance.choice(files)
    if chance.random() < 0.1:
        path.unlink()
        return f"{path} removed"
    kind = chance.choice(list(DAMAGES))
    content = path.read_bytes()
    path.write_bytes(DAMAGES[kind](content, chance))
    return f"{path} {kind}"


def check_readers(paths: RunPaths, what: str) -> None:
    """Commands that read a run say what is damaged; they are not to end in a traceback."""
    for read in (
        lambda: collect([paths]),
        lambda: listing([paths]),
        lambda: explain(paths),
        lambda: write_report(paths, paths.root / "report.html"),
    ):
        try:
            read()
        except LauncherError:
            continue
        except Exception as error:
            error.add_note(what)
            raise


def check_start(trial: Trial, what: str) -> bool:
    """Start the damaged run, and return whether it was trained."""
    (codes,) = run_ranks(1, start, trial.paths.config)
    found = {line["step"]: line["loss"] for line in read_metrics(trial.paths) if "loss" in line}
    if codes[-1]:
        assert codes[-1] in REFUSALS, (what, codes)
        return False
    assert {KEPT + 1, KEPT + 2} <= found.keys(), what
    assert found == {step: trial.losses[step] for step in found}, what
    return True


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_run_goes_on_as_it_was_or_says_why_not(trial: Trial, target: str) -> None:
    chance = random.Random(f"{target} 2")
    what = damage(trial, target, chance)
    check_readers(trial.paths, what)
    check_start(trial, what)


def test_damage_of_everything_of_one_kind_starts_nothing_anew(trial: Trial) -> None:
    trial.restore()
    for path in trial.folder.glob(TARGETS["marker"]):
        path.write_bytes(b"")
    assert run_ranks(1, start, trial.paths.config) == [[0, ExitCode.IO_ERROR]]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow  # the same for longer
def test_many_damages(trial: Trial, target: str, seed: int) -> None:
    chance = random.Random(f"{target} {seed} slow")
    what = damage(trial, target, chance)
    check_readers(trial.paths, what)
    check_start(trial, what)


@pytest.mark.slow  # readers alone, which are quick
def test_readers_of_many_damaged_runs(trial: Trial) -> None:
    chance = random.Random(11)
    for _ in range(400):
        target = chance.choice(["config", "records", "json", "marker"])
        check_readers(trial.paths, damage(trial, target, chance))


def test_damaged_lines_among_the_metrics_do_not_end_a_run(trial: Trial) -> None:
    trial.restore()
    lines = trial.paths.metrics.read_text().splitlines(keepends=True)
    bad = ["[" * 100_000, '{"step": null}', '{"loss": 1.0}', '{"step": ' + "1" * 5_000 + "}", json.dumps({"step": "3"})]
    trial.paths.metrics.write_text(lines[0] + "".join(f"{line}\n" for line in bad) + "".join(lines[1:]))
    assert check_start(trial, "lines put in")
