"""End a run that hangs: write the stacks of all ranks, name the ranks behind in an event, exit with code 76.

A thread on each rank checks that the rank leaves each phase in time. A step may take `multiple` times the median of the
steps before it, and at least `floor_seconds`; loading, the first step, evaluation and checkpoints have other limits.
The first rank that exceeds one asks all others for their positions (sft.health.rank_positions), and all write stacks.

Two kinds of hang stop Python threads as well. In a C call that holds the GIL, faulthandler's timer, a C thread that the
watchdog postpones again and again, writes the stacks; so does faulthandler's C handler of SIGQUIT, which a rank on the
same host sends. A stopped process can write nothing; a rank on the same host reports the state of the process. In both
cases the other ranks exit with 76, and Slurm or the local launcher ends the one that hangs. A run of one rank that
holds the GIL is ended by faulthandler, whose exit code is 1.

Where all ranks of a node are stopped, rank 0 misses what one of them shows every few seconds, and the other nodes miss
the answers of rank 0's store. A run of which all ranks are stopped ends with its job's time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter, deque

from launcher.contract import processes
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, append_event, write_json
from launcher.contract.spec import WatchdogSpec
from sft.health.rank_positions import (
    Board,
    Phase,
    Position,
    claim_report,
    main_thread_place,
    ranks_behind,
)
from sft.runtime.rank_env import RankEnv, node_name

_LOOK_SECONDS = 5.0
"""Time between two checks."""
_LEFT = "left"
"""What a node shows when its ranks have finished."""
_NAMED = 8
"""Number of ranks that the event names; hang.json has all."""


class Allowance:
    """The time limits of phases."""

    def __init__(self, spec: WatchdogSpec) -> None:
        self._spec = spec
        self._seconds: deque[float] = deque(maxlen=100)

    def add(self, seconds: float) -> None:
        """Record the time of a step. Leave out the first of an attempt, which compiles and warms up."""
        self._seconds.append(seconds)

    def of(self, phase: Phase, step_is_first: bool) -> float:
        """Return the seconds that `phase` may last."""
        if phase in (Phase.LOADING, Phase.GUARD):
            return self._spec.loading_seconds
        if phase is Phase.EVALUATION:
            return self._spec.evaluation_seconds
        if phase is Phase.CHECKPOINT:
            return self._spec.checkpoint_seconds
        if step_is_first:
            return self._spec.first_step_seconds
        median = statistics.median(self._seconds) if self._seconds else 0.0
        return max(self._spec.floor_seconds, self._spec.multiple * median)

    @property
    def shortest(self) -> float:
        """The shortest limit that any phase can have, in seconds."""
        spec = self._spec
        return min(spec.floor_seconds, spec.first_step_seconds, spec.evaluation_seconds, spec.checkpoint_seconds)


class Watchdog:
    """Watches this rank inside a `with` block."""

    def __init__(self, spec: WatchdogSpec, paths: RunPaths, env: RankEnv) -> None:
        self._spec, self._paths, self._env = spec, paths, env
        self._allowance = Allowance(spec)
        self._look = min(_LOOK_SECONDS, self._allowance.shortest / 10)
        self._grace = 3 * self._look + min(10.0, self._allowance.shortest)
        self._board = Board(env)
        self._stopped = threading.Event()
        self._now = (Phase.LOADING, 0, time.monotonic())
        """Phase, finished steps, and when the phase began; replaced as a whole, since two threads use it."""
        self._steps_here = 0
        self._neighbours: list[int] = []
        """Processes of the other ranks of this host, once all of them are known."""
        self._stopped_looks: Counter[int] = Counter()
        """Looks in a row at which each neighbour was stopped. Not the time: a suspended job has all ranks stopped."""
        self._beats: dict[int, str] = {}
        self._silent_looks: Counter[int] = Counter()
        """Looks in a row at which each other node had shown nothing new, by its first rank. Only rank 0 looks."""
        self._looks = 0
        self._stacks = paths.stacks(env.attempt, env.rank)

    def __enter__(self) -> Watchdog:
        """Begin to watch, unless the config disables the watchdog."""
        if not self._spec.enabled:
            return self
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._stacks.open("a", encoding="utf-8")  # opened beforehand: a C handler cannot
        faulthandler.register(signal.SIGQUIT, file=self._file, all_threads=True)
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        if not self._spec.enabled:
            return
        self._stopped.set()
        if self._shows_its_node:
            self._board.beat(_LEFT)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGQUIT)
        self._file.close()
        with contextlib.suppress(OSError):
            if self._stacks.stat().st_size == 0:
                self._stacks.unlink()

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Say that `phase` begins. `step` is the number of finished steps, if that has changed."""
        self._now = (phase, self._now[1] if step is None else step, time.monotonic())

    def step_finished(self, step: int) -> None:
        """Say that step number `step` has ended."""
        if self._steps_here:
            self._allowance.add(time.monotonic() - self._now[2])
        self._steps_here += 1
        self.enter(Phase.GUARD, step)

    def joined(self) -> None:
        """Say that the process group is up, so that the ranks can reach the rendezvous store."""
        if self._spec.enabled:
            self._board.join(self._position(answered=False))

    def place(self) -> dict[str, object]:
        """Return phase, number of finished steps, and seconds since the phase began."""
        phase, step, since = self._now
        return {"phase": phase.name.lower(), "step": step, "seconds": round(time.monotonic() - since, 1)}

    def _position(self, *, answered: bool) -> Position:
        phase, step, since = self._now
        where, waiting = main_thread_place()
        return Position(
            rank=self._env.rank,
            host=node_name(),
            pid=os.getpid(),
            step=step,
            phase=phase.name,
            seconds=round(time.monotonic() - since, 1),
            where=where,
            waiting=waiting,
            answered=answered,
        )

    def _run(self) -> None:
        while not self._stopped.wait(self._look):
            phase, _, since = self._now
            allowed = self._allowance.of(phase, self._steps_here == 0)
            left = since + allowed - time.monotonic()
            alone = self._env.world_size == 1
            with contextlib.suppress(ValueError):  # the file is closed: training has ended
                faulthandler.dump_traceback_later(max(left, 0) + 3 * self._look, exit=alone, file=self._file)
            overdue = left < 0 or (phase is not Phase.LOADING and self._sees_stopped_ranks())
            if (overdue or self._board.is_requested()) and not self._stopped.is_set():
                self._end(allowed)

    @property
    def _shows_its_node(self) -> bool:
        """Whether it is for this rank to show that its node's ranks run: rank 0 looks at all others."""
        return self._env.local_rank == 0 and self._env.rank > 0

    def _sees_stopped_ranks(self) -> bool:
        """Return whether another rank of this host, or all ranks of another node, are stopped."""
        self._looks += 1
        if self._shows_its_node:
            self._board.beat(str(self._looks))
        self._silent_looks[0] = self._silent_looks[0] + 1 if self._board.silent else 0
        return self._has_stopped_neighbour() or self._has_silent_node()

    def _has_silent_node(self) -> bool:
        """Return whether a node that had shown that it runs has shown nothing new for `floor_seconds`.

        Of rank 0's node the others know that its store gives no answers.
        """
        beats = self._board.beats() if self._env.rank == 0 and self._env.world_size > self._env.local_world_size else {}
        for rank, beat in beats.items():
            silent = beat == self._beats.get(rank) and beat != _LEFT
            self._silent_looks[rank] = self._silent_looks[rank] + 1 if silent else 0
            self._beats[rank] = beat
        return max(self._silent_looks.values(), default=0) * self._look > self._spec.floor_seconds

    def _has_stopped_neighbour(self) -> bool:
        """Return whether another rank of this host has been stopped for `floor_seconds`.

        Saves and evaluations may take an hour, and a stopped process is no part of that.
        """
        if not self._neighbours and self._env.local_world_size > 1:
            first = self._env.first_of_node
            here = self._board.positions(range(first, first + self._env.local_world_size))
            if len(here) == self._env.local_world_size:
                self._neighbours = [position.pid for position in here if position.rank != self._env.rank]
        for pid in self._neighbours:
            self._stopped_looks[pid] = self._stopped_looks[pid] + 1 if processes.state(pid).startswith("T") else 0
        return max(self._stopped_looks.values(), default=0) * self._look > self._spec.floor_seconds

    def _end(self, allowed: float) -> None:
        """Write this rank's stacks, let one rank report the positions of all, and exit."""
        faulthandler.cancel_dump_traceback_later()
        position = self._position(answered=True)
        self._file.write(f"{position.describe()}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._board.publish(position)
        self._board.request()
        reports = claim_report(self._paths.logs / self._env.attempt / "hang.json")
        time.sleep(self._grace)
        self._probe_unresponsive_ranks()
        if reports:
            time.sleep(2 * self._look)
            self._report(allowed)
            self._board.close()
        else:
            deadline = time.monotonic() + 2 * self._grace
            while time.monotonic() < deadline and not self._is_reported():
                time.sleep(self._look)
        print(f"the run hangs: {position.describe()}; stacks are in {self._stacks}", flush=True)
        sys.stderr.flush()
        os._exit(ExitCode.HANG)

    def _is_reported(self) -> bool:
        return not self._board.lost and self._board.is_closed()

    def _probe_unresponsive_ranks(self) -> None:
        """On the lowest rank of this host that answered, make those that did not write their stacks."""
        first = self._env.first_of_node
        here = self._board.positions(range(first, first + self._env.local_world_size))
        answered = [position.rank for position in here if position.answered]
        if not answered or self._env.rank != min(answered):
            return
        for position in here:
            if not position.answered:
                state = processes.state(position.pid)
                with contextlib.suppress(OSError):
                    os.kill(position.pid, signal.SIGQUIT)
                self._board.publish(dataclasses.replace(position, process=state))

    def _report(self, allowed: float) -> None:
        """Write the event, hang.json, and the failure file, which names the rank that failed first."""
        positions = self._board.positions(range(self._env.world_size)) or [self._position(answered=True)]
        if self._board.lost and self._env.world_size > 1:  # rank 0 serves the board's store, so it hangs
            leader = Position(rank=0, host=self._env.master_addr, pid=0)
            positions = [leader, *(position for position in positions if position.rank)]
        last = ranks_behind(positions)
        folder = self._paths.logs / self._env.attempt
        write_json(folder / "hang.json", [dataclasses.asdict(position) for position in positions])
        with contextlib.suppress(FileExistsError), (folder / "failure").open("x", encoding="utf-8") as file:
            file.write(f"{int(ExitCode.HANG)} {last[0].rank} {last[0].host}\n")
        append_event(
            self._paths,
            "hang_detected",
            attempt=self._env.attempt,
            allowed_seconds=round(allowed, 1),
            step=min((position.step for position in positions if position.answered), default=0),
            told_apart=len(last) < len(positions) or len(positions) == 1,
            behind=[dataclasses.asdict(position) for position in last[:_NAMED]],
        )
        for position in last[:_NAMED]:
            print(f"behind: {position.describe()}", flush=True)
