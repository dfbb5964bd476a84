"""What the search for hub ids in a config comes to: snapshots, files still to fetch, remarks and problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from launcher.contract.errors import HubError
from launcher.contract.hub.client import fetch
from launcher.contract.hub.listing import Listing, listing_of
from launcher.contract.hub_cache import Repository, Snapshot
from launcher.contract.spec.fields import Problem

DEFAULT_REVISION = "main"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """Files of a snapshot that are not in the cache yet."""

    snapshot: Snapshot
    names: tuple[str, ...]
    size: int
    """Bytes."""


@dataclass(kw_only=True, slots=True)
class Found:
    """Collects what each key of a config means."""

    fetches: list[Fetch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, key: str, message: str) -> None:
        """Note what is wrong with the value of a key."""
        self.problems.append((key, message))

    def look_up(
        self, key: str, repository: Repository, revision: str, names_of: Callable[[Listing], list[str]]
    ) -> tuple[Listing, list[str]] | None:
        """Return the listing of a revision and the names of its files that `names_of` chooses, or note a problem.

        Files of these that the cache lacks are noted to be fetched.
        """
        try:
            listing = listing_of(repository, revision)
            names = names_of(listing)
            self._note(key, listing, names, revision)
        except HubError as error:
            for problem in error.problems:
                said = repository.id in problem
                self.problem(key, problem if said else f"{repository.kind} {repository.id}: {problem}")
            return None
        return listing, names

    def _note(self, key: str, listing: Listing, names: list[str], revision: str) -> None:
        missing, snapshot = listing.missing(names), listing.snapshot
        if missing and listing.note:
            raise HubError(
                f"{snapshot}: {missing[0]} is not in the cache ({listing.note.removeprefix('from the cache, ')})"
            )
        size = sum(listing.sizes.get(name, 0) for name in missing)
        if missing:
            self.fetches.append(Fetch(snapshot=snapshot, names=tuple(missing), size=size))
        of = "" if revision == snapshot.commit else f" ({revision})"
        files = f", {len(names)} file{'s' if len(names) > 1 else ''}" if snapshot.repository.kind == "dataset" else ""
        state = f"; {shown_size(size)} to fetch" if missing else ""
        known = f"; {listing.note}" if listing.note else ""
        partly = "; as far as the cache has it" if not listing.is_whole and listing.note else ""
        self.notes.append(
            f"{key}: {snapshot.repository.id} at commit {snapshot.commit[:12]}{of}{files}{state}{known}{partly}"
        )


def fetch_now(fetches: Iterable[Fetch]) -> None:
    """Fetch the files into the cache, or raise HubError."""
    for wanted in fetches:
        fetch(wanted.snapshot, wanted.names)


def without_weights(fetches: Iterable[Fetch]) -> Iterator[Fetch]:
    """Yield what there is to fetch except for the weights of models, for those who look at settings and data only."""
    for wanted in fetches:
        names = tuple(name for name in wanted.names if not name.endswith(".safetensors"))
        if names:
            yield replace(wanted, names=names)


def shown_size(size: int) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000  # type: ignore[assignment]
    return f"{size:,.1f} GB"
