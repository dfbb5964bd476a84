"""Run a function on n real ranks (processes with torchrun's variables set) and collect what each returns.

Each rank is forked from a server process that has imported everything a rank needs (tests.ranks_preload). A fork takes
30 ms, so a training of five steps on two ranks costs 1.2 s of CPU, and no rank inherits threads or state of the test
process or of an earlier rank: a rank function may patch modules and leave them so. The function must be importable
(defined at module level).

Rejected: ranks that stay up and run many cases. A second training in the same process saved 0.1 s of CPU over one in a
fresh fork, left 50 threads of gloo groups behind, and every patch in a rank function would have had to be undone.

The test process hosts the rendezvous, as torchrun does, on a port that the system gives it when it listens. Rejected:
to look for a free port and let rank 0 listen there, which two test runs at once can both find.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks_preload"])


class RankFailure(AssertionError):
    """A rank raised; the message holds its traceback."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    env: dict[str, str] | None = None,
    init: bool = False,
) -> list[Any]:
    """Return the results of `function(*args)` on ranks 0..world_size-1. `init` starts the gloo world first.

    Raises RankFailure with the first rank's traceback; the others are then killed. TimeoutError after `timeout` s.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world_size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torchrun's word for: rank 0 connects, too, and hosts nothing
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    output = Path(tempfile.mkdtemp(prefix="ranks-"))
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        variables = {**rendezvous, **(env or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        variables["RANK_OUTPUT"] = str(output / f"rank-{rank}.log")
        process = _context.Process(target=_rank_main, args=(sender, variables, init, function, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    except (RankFailure, TimeoutError) as error:
        error.add_note(_last_lines(output))
        raise
    finally:
        shutil.rmtree(output, ignore_errors=True)
        for process in processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[multiprocessing.connection.Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting)} did not answer in time")
        for rank, pipe in list(waiting.items()):
            if pipe not in ready:
                continue
            del waiting[rank]
            try:
                ok, value = pipe.recv()
            except EOFError:
                raise RankFailure(f"rank {rank} died without a word") from None
            if not ok:
                raise RankFailure(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _last_lines(output: Path, lines: int = 15) -> str:
    logs = sorted(output.iterdir())
    return "\n".join(f"{log.name}:\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in logs)


def _rank_main(
    sender: multiprocessing.connection.Connection,
    variables: dict[str, str],
    init: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(variables)
    _output_into(variables["RANK_OUTPUT"])
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if init:
            dist.init_process_group("gloo", rank=int(variables["RANK"]), world_size=int(variables["WORLD_SIZE"]))
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sender.close()
        os._exit(0)  # a peer that failed may have left collectives in flight: no orderly teardown to wait for


def _output_into(path: str) -> None:
    """Send what this process and its libraries print into a file of its own."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
