"""Copies of a run's state in the memory of its nodes, from which a restart in place goes on.

Each rank writes its part of a copy into its own node's memory and sends the file on to the rank that stands in the same
place on the next node, which keeps it as well: whichever node is lost, the others have all parts. A copy counts once
every rank has said that both files are whole; only then are older ones removed, so that there are two at most.

A copy that fails is told and leaves training alone. docs/explanation/restart-in-place.md has the reasons.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from launcher.contract.checksum import crc32
from launcher.contract.copy_folder import make_copy_folder
from launcher.contract.errors import CheckpointError
from launcher.contract.private_folder import is_private
from sft.checkpoint import copy_parts
from sft.checkpoint.copy_choice import Choice, Seen, choose
from sft.checkpoint.copy_parts import Part, data_path
from sft.checkpoint.file_exchange import Transfer, exchange
from sft.checkpoint.rank_state import RankState, expected_bytes, rank_state, restore
from sft.hf.read_ahead import available_memory
from sft.megatron.parallel.groups import ControlGroup

if TYPE_CHECKING:
    from sft.engine.module import SFTGPT

_COPIES = 2
"""The newest, and the one that is being written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlace:
    """Where a rank stands among the nodes."""

    rank: int
    ranks_per_node: int
    nodes: int
    node: str
    """Name of its node."""

    @property
    def world_size(self) -> int:
        return self.ranks_per_node * self.nodes

    @property
    def is_first(self) -> bool:
        """Whether it is the first rank of its node."""
        return self.rank % self.ranks_per_node == 0

    def beside(self, nodes: int) -> int:
        """Return the rank in the same place, so many nodes further."""
        return (self.rank + nodes * self.ranks_per_node) % self.world_size


@dataclass(frozen=True, slots=True)
class Made:
    """A copy that is whole."""

    step: int
    bytes: int
    """Of this rank's own part."""
    seconds: float


class MemoryCopies:
    """The copies of one attempt. All methods are collective: every rank calls them in the same order."""

    def __init__(
        self, folder: Path, run: Path, place: NodePlace, control: ControlGroup, *, attempt: str, identity: str
    ) -> None:
        """Use `folder`. `identity` is that of the run, its layout and its data: other copies are never used."""
        self._folder = folder
        self._run = run
        self._attempt = attempt
        self._place = place
        self._control = control
        self._identity = identity
        self._whole: int | None = None
        """Step of the newest copy that every rank knows to be whole."""
        self.chosen: Choice | None = None
        """The copy that `look` has found, to go on from."""
        self.outcome: Made | str = "none was made yet"
        """What became of the last copy."""

    @property
    def folder(self) -> Path:
        """The folder in this node's memory."""
        return self._folder

    def open(self) -> str | None:
        """Make the folders, and return why there can be no copies, or None."""
        return self._agree(lambda: make_copy_folder(self._folder, self._run))

    # Going on from a copy ----------------------------------------------------------------------------------------

    def look(self, newer_than: int) -> Choice | str:
        """Find the newest whole copy of a step after `newer_than` and bring each rank its part of it.

        Return the choice, or why there is no copy to go on from. All other copies are removed.
        """
        found, damage = self._choose()
        if isinstance(found, Choice) and found.step <= newer_than:
            found = f"the newest whole copy is of step {found.step}, and a checkpoint of step {newer_than}"
        if isinstance(found, Choice):
            found = self._control.first_error(self._fetch(found)) or found
        self._settle(found if isinstance(found, Choice) else None)
        return f"{found}; {damage}" if isinstance(found, str) and damage is not None else found

    def forget(self) -> None:
        """Remove all copies: the run goes on from a checkpoint."""
        self._settle(None)

    def load(self, module: SFTGPT) -> tuple[int, dict[str, object]]:
        """Fill a module with the copy that `look` has found. Return its step and Lightning's counters."""
        if self.chosen is None:
            raise RuntimeError("no copy was chosen")
        path = data_path(self._folder, self.chosen.step, self._place.rank)
        try:
            state = cast("RankState", torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except (pickle.UnpicklingError, RuntimeError, OSError) as error:
            raise CheckpointError(f"copy {path} cannot be read, though its checksum is right: {error}") from error
        return self.chosen.step, restore(module, state)

    def _settle(self, choice: Choice | None) -> None:
        self.chosen = choice
        self._whole = None if choice is None else choice.step
        if self._place.is_first:
            copy_parts.remove_copies(self._folder, but=self._whole)
        self._control.barrier()  # no rank writes a copy while old ones are being removed

    def _choose(self) -> tuple[Choice | str, str | None]:
        """Return what all nodes' copies allow, and the first part that is damaged.

        The ranks of a node share the work of comparing checksums.
        """
        place = self._place
        own = copy_parts.parts_in(self._folder, self._identity)[
            place.rank % place.ranks_per_node :: place.ranks_per_node
        ]
        problems = {part: copy_parts.damage(self._folder, part) for part in own}
        whole = tuple(part for part, problem in problems.items() if problem is None)
        found = choose(self._control.gather(Seen(node=place.node, parts=whole)))
        return found, self._control.first_error(next(filter(None, problems.values()), None))

    def _fetch(self, choice: Choice) -> str | None:
        """Take part in bringing ranks their parts from other nodes, in the order of ranks. Return what went wrong."""
        problem: str | None = None
        for receiver in choice.fetched:
            part, source = choice.parts[receiver], choice.sources[receiver]
            path = data_path(self._folder, part.step, receiver)
            if self._place.rank == source:
                problem = exchange(self._control, Transfer(path, part.bytes, receiver), None) or problem
            elif self._place.rank == receiver:
                problem = self._keep(part, None, Transfer(path, part.bytes, source)) or problem
        return problem

    def _keep(self, part: Part, outgoing: Transfer | None, incoming: Transfer) -> str | None:
        """Receive a part, compare its checksum and describe it. Return what went wrong."""
        problem = exchange(self._control, outgoing, incoming)
        problem = problem or copy_parts.damage(self._folder, part)
        if problem is not None:
            return problem
        try:
            copy_parts.describe(self._folder, part)
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return None

    # Making copies -----------------------------------------------------------------------------------------------

    def lack_of_room(self, module: SFTGPT) -> str | None:
        """Return why copies of a module do not fit into the memory of a node, on every rank, or None."""
        place = self._place
        needed = self._control.gather(expected_bytes(module))
        problem = None
        if place.is_first:
            own = sum(needed[place.rank : place.rank + place.ranks_per_node])
            before = place.beside(-1)
            others = sum(needed[before : before + place.ranks_per_node]) if place.nodes > 1 else 0
            kept = sum(path.stat().st_size for path in self._folder.iterdir())
            disk, memory = shutil.disk_usage(self._folder).free + kept, available_memory() + kept
            if _COPIES * (own + others) > min(disk, memory):
                problem = (
                    f"copies on {place.node} take {_COPIES} x ({_mib(own)} MiB of its own ranks + {_mib(others)} MiB "
                    f"of another node's) = {_mib(_COPIES * (own + others))} MiB, and {_mib(disk)} MiB are free in "
                    f"{self._folder.parent}, {_mib(memory)} MiB in memory"
                )
        return self._control.first_error(problem)

    def make(self, step: int, module: SFTGPT, counters: Mapping[str, object]) -> None:
        """Make a copy of this step, and say in `outcome` how that went: a failure leaves the one before."""
        began = time.perf_counter()
        if self._place.is_first:
            copy_parts.remove_copies(self._folder, but=self._whole, before=step)
        parts: list[Part] = []
        problem = self._agree(lambda: parts.append(self._write(step, rank_state(module, counters))))
        if problem is None and self._place.nodes > 1:
            others = self._control.gather(parts[0])
            problem = self._control.first_error(self._swap(others))
        if problem is not None:
            for rank in {self._place.rank, self._place.beside(-1)}:
                copy_parts.remove_part(self._folder, step, rank)
            self.outcome = problem
            return
        self._whole = step
        self.outcome = Made(step, parts[0].bytes, time.perf_counter() - began)

    def remove(self) -> None:
        """Remove all copies of this start of the job from this node, once no rank needs them any more."""
        self._control.barrier()
        if self._place.is_first:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, step: int, state: RankState) -> Part:
        if not is_private(self._folder):  # some sites remove a user's files when a shell on the node ends
            make_copy_folder(self._folder, self._run)
        path = data_path(self._folder, step, self._place.rank)
        with os.fdopen(copy_parts.open_new(path), "wb") as file, _without_torchs_checksums():
            torch.save(state, file)
        part = Part(
            identity=self._identity,
            attempt=self._attempt,
            step=step,
            rank=self._place.rank,
            bytes=path.stat().st_size,
            crc32=crc32(path),
        )
        copy_parts.describe(self._folder, part)
        return part

    def _swap(self, parts: list[Part]) -> str | None:
        """Send this rank's part to the next node, and keep the one that comes from the node before."""
        before, after = self._place.beside(-1), self._place.beside(1)
        own, other = parts[self._place.rank], parts[before]
        outgoing = Transfer(data_path(self._folder, own.step, own.rank), own.bytes, after)
        incoming = Transfer(data_path(self._folder, other.step, other.rank), other.bytes, before)
        return self._keep(other, outgoing, incoming)

    def _agree(self, action: Callable[[], None]) -> str | None:
        """Do something on every rank, and return on all of them the first error of a disk, or None."""
        problem = None
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
            problem = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return self._control.first_error(problem)


@contextlib.contextmanager
def _without_torchs_checksums() -> Iterator[None]:
    """Leave out the checksums that torch.save makes of each tensor: they take longer than all else that it does."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"
