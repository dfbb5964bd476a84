"""Local ranks: the environment they get, and how they end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.contract.local_ranks import held_port, run_ranks
from launcher.contract.processes import start_ticks

TELL = "import json, os; print(json.dumps(dict(os.environ)), flush=True)\n"
NEVER = "import time; time.sleep(600)\n"
RANK = "import os; rank = int(os.environ['RANK'])\n"


def ranks(code: str, tmp_path: Path, number: int = 3, grace: float = 0.3) -> int:
    return run_ranks([sys.executable, "-c", code], number, tmp_path, grace)


def test_environment_and_logs(tmp_path: Path) -> None:
    assert ranks(TELL, tmp_path) == 0
    told = [json.loads((tmp_path / f"rank-{rank}.log").read_text()) for rank in range(3)]
    assert [(env["RANK"], env["LOCAL_RANK"]) for env in told] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {env["WORLD_SIZE"] for env in told} == {env["LOCAL_WORLD_SIZE"] for env in told} == {"3"}
    assert {env["MASTER_ADDR"] for env in told} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in told}) == 1
    assert not (tmp_path / "failure").exists()


def test_first_failure_ends_the_others_and_names_the_code(tmp_path: Path) -> None:
    assert ranks(RANK + "import sys\nif rank == 1: sys.exit(74)\n" + NEVER, tmp_path) == 74
    assert (tmp_path / "failure").read_text().split()[:2] == ["74", "1"]


def test_rank_that_ignores_term_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    assert ranks(RANK + stubborn + "if rank == 0: sys.exit(3)\n" + NEVER, tmp_path) == 3


def test_all_ranks_asking_to_go_on_later(tmp_path: Path) -> None:
    assert ranks("raise SystemExit(75)", tmp_path) == 75


def test_death_by_signal_is_128_and_more(tmp_path: Path) -> None:
    assert ranks("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path, number=1) == 137


def test_within_the_grace_period_ranks_may_finish(tmp_path: Path) -> None:
    code = RANK + "import sys, time\nif rank == 0: sys.exit(5)\ntime.sleep(0.5); print('done')\n"
    assert ranks(code, tmp_path, number=2, grace=20) == 5
    assert (tmp_path / "rank-1.log").read_text() == "done\n"


def start(tmp_path: Path, code: str) -> subprocess.Popen[bytes]:
    """The module as a program, and its ranks at work."""
    command = [sys.executable, "-m", "launcher.contract.local_ranks", "--ranks=2", f"--log-dir={tmp_path}", "--grace=5"]
    process = subprocess.Popen([*command, "--", sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    wait_for(lambda: all((tmp_path / f"rank-{rank}.log").exists() for rank in range(2)))
    wait_for(lambda: all((tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)))
    return process


def wait_for(condition: object, seconds: float = 30) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_reach_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time\n"
        "def stop(number, frame): print(f'got {number}', flush=True); time.sleep(0.2); sys.exit(75)\n"
        f"signal.signal({int(number)}, stop)\nprint('ready', flush=True)\n"
    )
    process = start(tmp_path, code + NEVER)
    process.send_signal(number)
    assert process.wait(30) == 75
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}.log").read_text() == f"ready\ngot {int(number)}\n"


def test_ranks_die_with_their_parent(tmp_path: Path) -> None:
    process = start(tmp_path, "import os; print(os.getpid(), flush=True)\n" + NEVER)
    pids = [int((tmp_path / f"rank-{rank}.log").read_text()) for rank in range(2)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    wait_for(lambda: all(start_ticks(pid) is None for pid in pids))


def test_the_rendezvous_port_is_rank_0s_alone() -> None:
    """Nobody is given it, and nobody without SO_REUSEADDR can take it; torch's store, which has that, can listen."""
    distributed = pytest.importorskip("torch.distributed")

    with held_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        assert store.port == port
        with held_port() as second:
            assert second != port


def test_a_failure_that_cannot_be_written_down_has_its_code_all_the_same(tmp_path: Path) -> None:
    """On a full disk the file that says which rank failed cannot be written: the code was seen to become 1."""
    (tmp_path / "failure").mkdir()
    assert ranks(RANK + "import sys\nif rank == 1: sys.exit(74)\n" + NEVER, tmp_path) == 74
    (tmp_path / "failure").rmdir()
    (tmp_path / "failure").touch()  # created, and then there was no room for a byte
    assert ranks(RANK + "import sys\nif rank == 1: sys.exit(74)\n" + NEVER, tmp_path) == 74
