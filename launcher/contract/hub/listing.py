"""The files of a repository at one commit: as the hub names them, or as far as the local cache knows them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.contract.errors import HubError
from launcher.contract.hub.client import HubUnreachable, ask
from launcher.contract.hub_cache import COMMIT, Repository, Snapshot, cache_root, cached_commit, is_offline
from launcher.contract.rundir import write_atomic


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What a repository holds at a commit."""

    snapshot: Snapshot
    sizes: Mapping[str, int]
    """File -> bytes."""
    is_whole: bool
    """Whether these are all files of the commit, and not only those that the cache has."""
    note: str = ""
    """Why the hub was not asked, where that matters."""

    def missing(self, names: list[str]) -> list[str]:
        """Return those of the files that are not in the cache yet."""
        return [name for name in names if not (self.snapshot.path / name).is_file()]


@functools.cache
def listing_of(repository: Repository, revision: str) -> Listing:
    """Return the files at a branch, tag or commit. A process asks once.

    Raise HubError where there is no such thing, or where neither the hub nor the cache can tell.
    """
    if COMMIT.fullmatch(revision):
        known = _cached(repository, revision, note="")
        if known is not None and known.is_whole:
            return known  # a commit never changes
    if is_offline():
        return _only_cached(repository, revision, "HF_HUB_OFFLINE is set")
    try:
        commit, sizes = ask(repository, revision)
    except HubUnreachable as error:
        return _only_cached(repository, revision, str(error))
    snapshot = Snapshot(repository=repository, commit=commit, cache=cache_root())
    if revision != commit:
        remember(snapshot, revision)
    return Listing(snapshot=snapshot, sizes=sizes, is_whole=True)


def remember(snapshot: Snapshot, revision: str) -> None:
    """Write down in the cache which commit a revision is, for the time when the hub cannot be asked."""
    reference = snapshot.cache / snapshot.repository.folder / "refs" / revision
    if cached_commit(snapshot.repository, revision) == snapshot.commit:
        return
    try:
        write_atomic(reference, snapshot.commit)
    except OSError as error:
        raise HubError(
            f"the cache {snapshot.cache} cannot be written: {error.strerror}; set HF_HOME to another"
        ) from None


def _only_cached(repository: Repository, revision: str, why: str) -> Listing:
    known = _cached(repository, revision, note=f"from the cache, {why}")
    if known is None:
        raise HubError(
            f"{repository.kind} {repository.id} ({revision}) is not in the cache {cache_root()}, and the hub cannot be "
            f"asked: {why}"
        )
    return known


def _cached(repository: Repository, revision: str, note: str) -> Listing | None:
    """Return what the cache knows of the files at a revision, or None if it has none of them."""
    commit = cached_commit(repository, revision)
    if commit is None:
        return None
    snapshot = Snapshot(repository=repository, commit=commit, cache=cache_root())
    if not snapshot.path.is_dir():
        return None
    sizes = _recorded(snapshot)
    if sizes is not None:
        return Listing(snapshot=snapshot, sizes=sizes, is_whole=True, note=note)
    files = [path for path in snapshot.path.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(snapshot.path)): path.stat().st_size for path in files}
    return Listing(snapshot=snapshot, sizes=sizes, is_whole=False, note=note)


def _recorded(snapshot: Snapshot) -> Mapping[str, int] | None:
    """Return the sizes in the cache's own listing of a commit, which older versions of huggingface_hub do not write."""
    try:
        record = json.loads(snapshot.listing.read_text(encoding="utf-8"))
        return {str(name): int(entry["size"]) for name, entry in record["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
