"""Hub ids, and the local cache in which huggingface_hub keeps what it has fetched.

The cache's layout is documented and shared by all of Hugging Face's tools, so it is read here without any of them:

    CACHE/models--ORG--NAME/refs/main             the commit that the branch was at when it was last asked for
                            snapshots/COMMIT/     the files of that commit, links into blobs/
    CACHE/datasets--ORG--NAME/...

A run's config holds paths of snapshots, which name repository and commit: `snapshot_of` reads them back.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

Kind = Literal["model", "dataset"]

_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_ID = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_SNAPSHOT = re.compile(
    r"(?P<cache>/.*)/(?P<kind>model|dataset)s--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})"
    r"(?:/(?P<file>.+))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = ("1", "ON", "YES", "TRUE")
_FILE_ENDINGS = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zst|gguf|nemo|ya?ml|jinja2?|safetensors)", re.I)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A model or data set on the hub."""

    kind: Kind
    id: str

    @property
    def folder(self) -> str:
        """Name of its folder in the cache."""
        return f"{self.kind}s--{self.id.replace('/', '--')}"

    @property
    def page(self) -> str:
        """Its page, without the host."""
        return self.id if self.kind == "model" else f"datasets/{self.id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A repository at one commit, in a cache."""

    repository: Repository
    commit: str
    cache: Path

    @property
    def path(self) -> Path:
        """The folder of its files, which need not be there."""
        return self.cache / self.repository.folder / "snapshots" / self.commit

    @property
    def listing(self) -> Path:
        """Where newer versions of huggingface_hub keep the names of all files of the commit."""
        return self.cache / self.repository.folder / "trees" / f"{self.commit}.json"

    def __str__(self) -> str:
        return f"{self.repository.id}@{self.commit}"


def is_id(text: str) -> bool:
    """Return whether a text has the form ORG/NAME and not that of a file's name."""
    return _ID.fullmatch(text) is not None and not _FILE_ENDINGS.search(Path(text).suffix) and "--" not in text


def cache_root() -> Path:
    """Return the user's own cache, as Hugging Face's tools find it."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.abspath(os.path.expandvars(Path(cache).expanduser())))  # noqa: PTH100 (links stay as they are)


def is_offline() -> bool:
    """Return whether the user has forbidden to ask the hub."""
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _TRUE


def snapshot_of(path: str) -> Snapshot | None:
    """Return the snapshot that a path leads into, or None for any other path."""
    match = _SNAPSHOT.fullmatch(path)
    if match is None:
        return None
    repository = Repository(kind=cast(Kind, match["kind"]), id=f"{match['org']}/{match['name']}")
    return Snapshot(repository=repository, commit=match["commit"], cache=Path(match["cache"]))


def file_in_snapshot(path: str) -> str:
    """Return the part of a path behind its snapshot's folder, empty for that folder itself."""
    match = _SNAPSHOT.fullmatch(path)
    return (match["file"] or "") if match is not None else ""


def portable_name(path: str) -> str:
    """Return the path, or for a file of a snapshot a name that is the same on every machine."""
    snapshot = snapshot_of(path)
    return path if snapshot is None else f"{snapshot}/{file_in_snapshot(path)}"


def cached_commit(repository: Repository, revision: str) -> str | None:
    """Return the commit that the cache knows a revision by, or None."""
    if COMMIT.fullmatch(revision):
        return revision
    reference = cache_root() / repository.folder / "refs" / revision
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if COMMIT.fullmatch(commit) else None
