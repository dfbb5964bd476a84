"""Replace the ids of data sets by the files of their splits."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import glob
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.contract.errors import HubError
from launcher.contract.hub.client import fetch
from launcher.contract.hub.found import DEFAULT_REVISION, Found
from launcher.contract.hub.listing import Listing
from launcher.contract.hub.splits import CARD, DEFAULT_SPLIT, Wanted, split_files
from launcher.contract.hub.texts import is_meant
from launcher.contract.hub_cache import Repository, Snapshot, file_in_snapshot, is_id, snapshot_of
from launcher.contract.spec import DataSpec, HubSpec

_SPLIT = re.compile(r"\w[\w.-]*", re.ASCII)


def resolve_data(data: DataSpec, found: Found) -> DataSpec:
    """Return the section with files in place of ids. Of each data set, README.md is fetched for that."""
    whole = _Scope(key="data.hub", hub=data.hub, found=found)
    train = whole.files("data.train", data.train, split=data.hub.split or DEFAULT_SPLIT)
    held_out = whole.files("data.validation", data.validation, split=None)
    further = {name: whole.one("data.validation_sets", name, text) for name, text in data.validation_sets.items()}
    sources = {}
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        own = source.hub != HubSpec()
        scope = _Scope(key=f"{key}.hub", hub=source.hub, found=found) if own else whole
        files = scope.files(f"{key}.files", source.files, split=scope.hub.split or DEFAULT_SPLIT)
        sources[name] = dataclasses.replace(source, files=files, hub=scope.pinned() if own else source.hub)
    return dataclasses.replace(
        data, train=train, validation=held_out, validation_sets=further, sources=sources, hub=whole.pinned()
    )


@dataclass(kw_only=True, slots=True)
class _Scope:
    """The keys for which one `hub` section says what their ids mean."""

    key: str
    hub: HubSpec
    found: Found
    commits: dict[str, str] = field(default_factory=dict)
    """Repository -> the commit that is read."""
    listings: dict[str, Listing] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    """Repositories that were named by id, found or not."""
    reads_split: bool = False
    """Whether some id has no split of its own, so that the section's counts."""

    def files(self, key: str, texts: Sequence[str], split: str | None) -> list[str]:
        """Return the files that a list of paths and ids stands for."""
        moved = self._pinned_files(key, texts)
        return [file for text in texts for file in (self._split(key, text, split) or [moved.get(text, text)])]

    def one(self, key: str, name: str, text: str) -> str:
        """Return the file, or the glob of the files, that one path or id stands for."""
        files = self.files(key, [text], split=None)
        if len(files) == 1:
            return files[0]
        form = _glob_of(files, self.listings[text.partition(":")[0]])
        if form is None:
            self.found.problem(key, f"{name}: {text} is {len(files)} files, and no glob is only these; name a glob")
        return form or text

    def pinned(self) -> HubSpec:
        """Return the section as the run keeps it: of its settings only the commit still says something."""
        if self.hub == HubSpec():
            revision = next(iter(self.commits.values())) if len(self.commits) == 1 else None
            return HubSpec(revision=revision)
        given = ", ".join(name for name in ("split", "config", "revision") if getattr(self.hub, name) is not None)
        if not self.commits and not self.ids:
            self.found.problem(self.key, f"{given} needs a data set of the hub (ORG/NAME); drop it, or name one")
        if len(self.ids | self.commits.keys()) > 1 and (self.hub.config or self.hub.revision):
            names = ", ".join(sorted(self.ids | self.commits.keys()))
            self.found.problem(
                self.key, f"{given} would be that of {names}; give each a source of its own, with its own hub section"
            )
        if self.ids and self.hub.split is not None and not self.reads_split:
            self.found.problem(
                f"{self.key}.split", f"{self.hub.split}: {', '.join(sorted(self.ids))} has a split in its id; drop one"
            )
        if self.commits and not self.ids:
            self._check_unchanged(next(iter(self.commits.values())))
        revision = next(iter(self.commits.values())) if len(self.commits) == 1 else None
        return HubSpec(revision=revision)

    def _check_unchanged(self, commit: str) -> None:
        """Note settings that come too late: the files of a resolved config are fixed."""
        changed = [name for name in ("split", "config") if getattr(self.hub, name) is not None]
        if self.hub.revision not in (None, commit):
            changed.append("revision")
        for name in changed:
            self.found.problem(
                f"{self.key}.{name}", f"{getattr(self.hub, name)} is not what these files are; name the data set by id"
            )

    def _split(self, key: str, text: str, split: str | None) -> list[str] | None:
        """Return the files of a split, or None for a text that is no id or means nothing."""
        name, colon, named_split = text.partition(":")
        if not is_id(name):
            return None
        given = bool(colon) or (split is not None and bool(self.hub.config or self.hub.revision or self.hub.split))
        if not is_meant(key, name, self.found, named=given):
            if colon:
                self.found.problem(key, f"{text}: {name} is a folder here, which has no splits; name its files")
            return None
        self.ids.add(name)
        self.reads_split |= not colon and split is not None
        split = named_split if colon else split
        if split is None:
            self.found.problem(key, f"{text} needs its split, e.g. {name}:validation or {name}:test")
            return None
        if not _SPLIT.fullmatch(split):
            self.found.problem(key, f"{text}: {split!r} is not the name of a split; parts of a split cannot be chosen")
            return None
        wanted = Wanted(split=split, config=self.hub.config)
        repository = Repository(kind="dataset", id=name)
        answer = self.found.look_up(
            key, repository, self.hub.revision or DEFAULT_REVISION, lambda listing: _files_of(listing, wanted)
        )
        if answer is None:
            return None
        listing, names = answer
        self.listings[name], self.commits[name] = listing, listing.snapshot.commit
        return [str(listing.snapshot.path / file) for file in names]

    def _pinned_files(self, key: str, texts: Sequence[str]) -> dict[str, str]:
        """Return where the files that a resolved config names are now, for those that are not where it names them."""
        gone: dict[Snapshot, list[str]] = {}
        for text in texts:
            pinned = snapshot_of(text)
            if pinned is not None:
                self.commits[pinned.repository.id] = pinned.commit
                # A link to a blob that was removed is no file, and glob finds it all the same.
                if not any(Path(path).exists() for path in (text, *glob.glob(text))):  # noqa: PTH207 (it is absolute)
                    gone.setdefault(pinned, []).append(text)
        moved: dict[str, str] = {}
        for pinned, paths in gone.items():
            forms = [file_in_snapshot(path) for path in paths]
            answer = self.found.look_up(
                key, pinned.repository, pinned.commit, functools.partial(_matching, forms=forms)
            )
            if answer is not None:
                moved |= {path: str(answer[0].snapshot.path / form) for path, form in zip(paths, forms, strict=True)}
        return moved


def _matching(listing: Listing, forms: Sequence[str]) -> list[str]:
    """Return the files that names or globs stand for, or raise HubError where there is none for one of them."""
    names = []
    for form in forms:
        matches = [name for name in listing.sizes if name == form or fnmatch.fnmatch(name, form)]
        if not matches:
            raise HubError(f"{listing.snapshot} has no file {form}")
        names += matches
    return names


def _files_of(listing: Listing, wanted: Wanted) -> list[str]:
    card = None
    if CARD in listing.sizes:
        if listing.missing([CARD]) and listing.note:
            raise HubError(f"{listing.snapshot}: {CARD} is not in the cache, and {listing.note}")
        if listing.missing([CARD]):
            fetch(listing.snapshot, [CARD], quiet=True)
        card = (listing.snapshot.path / CARD).read_text(encoding="utf-8", errors="replace")
    return split_files(listing.sizes, card, wanted)


def _glob_of(files: Sequence[str], listing: Listing) -> str | None:
    """Return a glob that among the files of their folder matches just these, or None."""
    first = os.path.commonprefix(files)  # noqa: RUF071 (characters are what is compared)
    last = os.path.commonprefix([file[::-1] for file in files])[::-1]  # noqa: RUF071
    folder = os.path.dirname(files[0])  # noqa: PTH120
    if any(os.path.dirname(file) != folder for file in files) or set(first + last) & set("*?["):  # noqa: PTH120
        return None
    form = f"{first}*{last}"
    matched = [name for name in listing.sizes if fnmatch.fnmatch(str(listing.snapshot.path / name), form)]
    return form if len(matched) == len(files) else None
