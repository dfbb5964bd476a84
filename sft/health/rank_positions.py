"""The position of each rank when a run hangs, and which ranks are behind.

A rank keeps its position in its own memory. When one is overdue it asks for the positions of all, through the
rendezvous store, and all publish theirs. One rank of each node shows there that it runs, for nodes whose ranks are all
stopped. A healthy run thus costs a query of a key every few seconds and rank, and another for each node, answered from
the memory of rank 0's process; one rank writes to the shared file system after a hang.
Rejected: heartbeat files, which cost a shared file system one operation per rank and beat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sft.runtime.rank_env import RankEnv

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_WAITING = ("/torch/distributed/", "/megatron/core/pipeline_parallel/", "/megatron/core/distributed/")
"""Parts of the paths of source files in which the main thread waits for other ranks."""
_STORE_SECONDS = 10.0
"""Time limit of the store's own operations."""
_WAITS = 4
"""Parts in which a call is waited for."""


class Phase(IntEnum):
    """What a rank is doing, in the order of a step: a rank in a lower phase of the same step is behind."""

    LOADING = 0
    """Setting up data, process groups and weights, or reading a checkpoint."""
    DATA = 1
    """Reading the next batch."""
    STEP = 2
    """Forward, backward and optimizer step."""
    GUARD = 3
    """Checking the step's numbers; loading a checkpoint where they are bad."""
    EVALUATION = 4
    """Computing held-out losses and answers."""
    CHECKPOINT = 5
    """Saving, and everything else between steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """The position of one rank, as it is stored and written to hang.json."""

    rank: int
    host: str
    pid: int
    step: int = 0
    """Number of finished steps."""
    phase: str = Phase.LOADING.name
    seconds: float = 0.0
    """Time since the phase began."""
    where: str = ""
    """Innermost frame of the main thread, as file:line function."""
    waiting: bool = False
    """Whether that frame waits for other ranks."""
    answered: bool = False
    """Whether the rank published this when asked; False for one that did not answer."""
    process: str = ""
    """State of an unresponsive rank's process in the kernel, e.g. T (stopped)."""

    def describe(self) -> str:
        """Return one line for people."""
        state = f"{self.phase.lower()} after step {self.step}, for {self.seconds:.0f} s, at {self.where}"
        silent = f"gave no answer{f'; its process is {self.process}' if self.process else ''}"
        return f"rank {self.rank} on {self.host}: {state if self.answered else silent}"


def main_thread_place() -> tuple[str, bool]:
    """Return the main thread's innermost frame as `file:line function`, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "", False
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} {code.co_name}", any(part in code.co_filename for part in _WAITING)


def ranks_behind(positions: Sequence[Position]) -> list[Position]:
    """Return the ranks that the others wait for.

    Those that did not answer; if all did, those of the earliest step and phase; of these, the ones that wait for no
    other rank. Where nothing distinguishes the ranks, all are returned.
    """
    unresponsive = [position for position in positions if not position.answered]
    if unresponsive:
        return unresponsive
    least = min((position.step, Phase[position.phase]) for position in positions)
    last = [position for position in positions if (position.step, Phase[position.phase]) == least]
    return [position for position in last if not position.waiting] or last


class Board:
    """The positions of all ranks in the rendezvous store, and the request for them.

    Rank 0 serves the store, and it may be the one that hangs: then calls do not return. So each call runs in its own
    thread and is abandoned after a time limit; after that the board is `lost`, and each rank relies on its own clock.
    """

    def __init__(self, env: RankEnv) -> None:
        self._env = env
        self._store: Store | None = None
        self.lost = env.world_size == 1
        self.silent = False
        """The store is lost because it gave no answer: rank 0 is stopped. One that has ended refuses connections."""

    def join(self, position: Position) -> None:
        """Connect to the store, which must be up by now, and publish this rank's position."""
        if self.lost or self._store is not None:
            return
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        def connect() -> Store:
            store = TCPStore(
                self._env.master_addr, self._env.master_port, is_master=False, timeout=timedelta(seconds=_STORE_SECONDS)
            )
            return PrefixStore("watchdog", store)

        self._store = self._limited(connect)
        self.publish(position)

    def publish(self, position: Position) -> None:
        """Store a position for the other ranks to read."""
        text = json.dumps(dataclasses.asdict(position))
        self._call(lambda store: store.set(f"rank/{position.rank}", text))

    def request(self) -> None:
        """Ask all ranks to publish their positions."""
        self._call(lambda store: store.set("asked", "1"))

    def is_requested(self) -> bool:
        """Return whether any rank has asked for the positions."""
        return bool(self._call(lambda store: store.check(["asked"])))

    def beat(self, text: str) -> None:
        """Show that a rank of this node runs. `text` has to change from beat to beat."""
        self._call(lambda store: store.set(f"beat/{self._env.first_of_node}", text))

    def beats(self) -> dict[int, str]:
        """Return the last beat of each other node by its first rank, without those that have not begun."""
        nodes = range(0, self._env.world_size, self._env.local_world_size)
        keys = {rank: f"beat/{rank}" for rank in nodes if rank != self._env.first_of_node}

        def read(store: Store) -> dict[int, str]:
            return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}

        return self._call(read) or {}

    def close(self) -> None:
        """Let all ranks end."""
        self._call(lambda store: store.set("closed", "1"))

    def is_closed(self) -> bool:
        """Return whether the ranks may end: a rank has closed the board, or the store cannot be reached."""
        return self.lost or bool(self._call(lambda store: store.check(["closed"])))

    def positions(self, ranks: Iterable[int]) -> list[Position]:
        """Return the last published positions of these ranks, without those that published none."""

        def read(store: Store) -> list[Position]:
            known = [f"rank/{rank}" for rank in ranks if store.check([f"rank/{rank}"])]
            return [Position(**json.loads(store.get(key))) for key in known]

        return self._call(read) or []

    def _call(self, call: Callable[[Store], T]) -> T | None:
        """Return the result of a call of the store, None before `join` or if the store does not answer."""
        store = self._store
        return None if store is None else self._limited(lambda: call(store))

    def _limited(self, call: Callable[[], T]) -> T | None:
        """Return the result of `call`. If it fails or takes too long, return None and mark the board as lost."""
        if self.lost:
            return None
        result: list[T] = []

        def run() -> None:
            with contextlib.suppress(Exception):  # torch raises several kinds; each means: no store
                result.append(call())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        for _ in range(_WAITS):  # not in one: after SIGCONT a suspended job finds that its time is up
            thread.join(2 * _STORE_SECONDS / _WAITS)
        self.lost, self.silent = not result, thread.is_alive()
        return result[0] if result else None


def claim_report(path: Path) -> bool:
    """Return whether this rank reports the hang: it is the first to create `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    return True
