"""What runs on a node beside ranks: who is asked and believed, and what a shell there must not have."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.attempts.beside import shell_environment
from launcher.attempts.rank_stacks import lines_of_node, parse_faulthandler
from launcher.contract import processes, rank_sockets
from tests.slurm.processes import wait_until

CHECKOUT = Path(__file__).parents[3]

RANK = """
import os, sys, time, threading
from pathlib import Path
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import WatchdogSpec
from sft.health.stack_answers import answering
from sft.health.watchdog import Watchdog
from sft.runtime.rank_env import RankEnv

def busy():
    ACTION

paths, env = RunPaths(Path(sys.argv[1])), RankEnv.from_environ()
watchdog = Watchdog(WatchdogSpec(enabled=True), paths, env)
with watchdog, answering(paths.root, env, watchdog.place):
    print("ready", flush=True)
    busy()
"""


def start_rank(run: Path, rank: int, action: str) -> subprocess.Popen[str]:
    own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1", "SFT_ATTEMPT": "local-1"}
    environment = {**os.environ, **own, "PYTHONPATH": str(CHECKOUT), "OF_THE_RUN": "yes"}
    return subprocess.Popen(
        [sys.executable, "-c", RANK.replace("ACTION", action), str(run)],
        env=environment,
        cwd=run,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def two_ranks(run: Path, action: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The first waits, the second does `action`."""
    (run / "logs" / "local-1").mkdir(parents=True)
    started = [start_rank(run, 0, "time.sleep(600)"), start_rank(run, 1, action)]
    try:
        for rank in started:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n"
        yield started
    finally:
        for rank in started:
            rank.kill()
            rank.communicate()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def ranks(run: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks that wait."""
    with two_ranks(run, "time.sleep(600)") as started:
        yield started


def ask(run: Path, patience: float = 5.0) -> tuple[dict[int, dict[str, object]], dict[int, list[str]]]:
    """Return what is said about each rank, and the functions of its main thread."""
    lines = list(lines_of_node(run, "local-1", patience))
    abouts = {line["rank"]: line for line in lines if "host" in line}
    of_main = [line for line in lines if line.get("thread") == "MainThread"]
    names = {rank: [str(line["function"]) for line in of_main if line["rank"] == rank] for rank in abouts}
    return abouts, names  # type: ignore[return-value]


def test_ranks_tell_where_they_stand_and_go_on(ranks: list[subprocess.Popen[str]], run: Path) -> None:
    """A hundred times, and the main thread, which waits in a system call, is never woken."""
    before = [Path(f"/proc/{rank.pid}/status").read_text() for rank in ranks]
    for _ in range(100):
        abouts, names = ask(run)
        assert [about["answered"] for about in abouts.values()] == [True, True]
    assert {rank: about["pid"] for rank, about in abouts.items()} == {0: ranks[0].pid, 1: ranks[1].pid}
    assert names == {0: ["<module>", "busy"], 1: ["<module>", "busy"]}
    assert abouts[0]["phase"] == "loading"
    assert [rank.poll() for rank in ranks] == [None, None]
    after = [Path(f"/proc/{rank.pid}/status").read_text() for rank in ranks]
    switches = [_main_thread_switches(text) for text in before], [_main_thread_switches(text) for text in after]
    assert max(now - then for then, now in zip(*switches, strict=True)) < 20
    assert all(file.stat().st_size == 0 for file in (run / "logs" / "local-1").iterdir())


def _main_thread_switches(status: str) -> int:
    """Return how often the main thread has run: a signal would wake it."""
    return int(next(line for line in status.splitlines() if line.startswith("voluntary_ctxt")).split()[1])


def test_a_rank_that_keeps_the_gil_is_seen_and_goes_on(tmp_path: Path) -> None:
    with two_ranks(tmp_path, "sum(range(10**14))  # no Python bytecode runs meanwhile") as ranks:
        wait_until(lambda: not ask(tmp_path, patience=1.0)[0][1]["answered"], "the sum to begin", timeout=20)
        abouts, names = ask(tmp_path, patience=1.0)
        assert [abouts[rank]["answered"] for rank in (0, 1)] == [True, False]
        assert names[1] == ["<module>", "busy"]
        assert ranks[1].poll() is None


def test_a_rank_that_is_stopped_is_seen(ranks: list[subprocess.Popen[str]], run: Path) -> None:
    ranks[1].send_signal(signal.SIGSTOP)
    wait_until(lambda: processes.state(ranks[1].pid).startswith("T"), "the rank to stop", timeout=10, interval=0.01)
    abouts, names = ask(run, patience=0.5)
    assert (abouts[1]["answered"], abouts[1]["process"], names[1]) == (False, "T (stopped)", [])
    ranks[1].send_signal(signal.SIGCONT)
    wait_until(lambda: bool(ask(run)[0][1]["answered"]), "the rank to answer", timeout=10)


def test_a_program_in_the_environment_of_a_rank(ranks: list[subprocess.Popen[str]], run: Path) -> None:
    words = [sys.executable, "-m", "launcher.attempts.beside", "shell", str(run), "--attempt=local-1", "--rank=1"]
    show = [sys.executable, "-c", "import os; print(os.getcwd(), *sorted(os.environ))"]
    said = subprocess.run(
        [*words, "--", *show], env=os.environ, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0] == str(run)
    assert "OF_THE_RUN" in said
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SFT_ATTEMPT"} & set(said)
    gone = subprocess.run([*words[:-1], "--rank=7"], env=os.environ, capture_output=True, text=True)
    assert (gone.returncode, "rank 7 has no process" in gone.stderr) == (4, True)


def test_a_shell_cannot_pass_for_its_rank() -> None:
    """With the attempt's name it could take the run's lease, with the rendezvous it could join the ranks."""
    of_rank = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "3",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_PORT": "5",
        "SLURM_PROCID": "1",
        "SFT_ATTEMPT": "7.0",
        "SFT_SUBMISSION": "sft-0",
        "PMI_RANK": "1",
        "PMIX_RANK": "1",
    }
    own = {"SLURM_PROCID": "0", "TERM": "xterm", "RANK": "0", "HOME": "/root"}
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", "SLURM_PROCID": "0", "TERM": "xterm"}
    assert shell_environment(of_rank, own) == kept


def test_nobody_else_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user of the node may have taken a rank's name."""
    name = rank_sockets.address(tmp_path, "local-1", 0)
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(name)
        impostor.listen()
        assert rank_sockets.addresses(tmp_path, "local-1") == [(0, name)]
        monkeypatch.setattr(rank_sockets, "is_trusted", lambda uid: False)
        assert list(lines_of_node(tmp_path, "local-1", 1.0)) == []


ANOTHER_USER = """
import os, socket, sys
os.setgid(65534)
os.setuid(65534)
rank = socket.socket(socket.AF_UNIX)
rank.connect("\\0" + sys.argv[1])
print(len(rank.recv(100)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_told_nothing(ranks: list[subprocess.Popen[str]], run: Path) -> None:
    _, address = rank_sockets.addresses(run, "local-1")[0]
    command = [sys.executable, "-c", ANOTHER_USER, address.removeprefix("\0")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0\n"


def test_attempts_and_runs_have_sockets_of_their_own(tmp_path: Path) -> None:
    names = {
        rank_sockets.prefix(run, attempt) for run in (tmp_path / "a", tmp_path / "b") for attempt in ("1.0", "1.1")
    }
    assert len(names) == 4
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert rank_sockets.prefix(tmp_path / "link", "1.0") in names


FAULTHANDLER = """\
loading after step 0, for 3 s, at x.py:1 f
Thread 0x00007f1 (most recent call first):
  File "/a/threading.py", line 5 in wait
  File "/a/threading.py", line 9 in run

Current thread 0x00007f2 (most recent call first):
  File "/a/inner.py", line 2 in inner
  File "<string>", line 7 in <module>
"""


def test_stacks_of_faulthandler() -> None:
    assert parse_faulthandler(FAULTHANDLER) == [
        {"name": "MainThread", "frames": [("<string>", 7, "<module>"), ("/a/inner.py", 2, "inner")]},
        {"name": "thread 1", "frames": [("/a/threading.py", 9, "run"), ("/a/threading.py", 5, "wait")]},
    ]
    assert parse_faulthandler("") == []


def test_a_rank_without_a_handler_is_not_signalled(tmp_path: Path) -> None:
    """It would end."""
    assert not processes.catches(os.getpid(), signal.SIGQUIT)
    child = subprocess.Popen([sys.executable, "-c", "import faulthandler as f, time; f.register(3); time.sleep(60)"])
    try:
        wait_until(lambda: processes.catches(child.pid, signal.SIGQUIT), "the handler", timeout=20, interval=0.02)
    finally:
        child.kill()
        child.wait()
