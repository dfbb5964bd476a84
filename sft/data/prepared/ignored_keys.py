"""Refuse a key of data.ignore_keys that lets nothing pass: it is misspelt, or of other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import DataError, did_you_mean
from launcher.contract.spec import RunSpec
from sft.data.cache.store import MOST_UNREAD, TokenCache
from sft.data.reading.prompt_rows import prompt_keys


def check_ignored_keys(spec: RunSpec, caches: Sequence[TokenCache]) -> None:
    """Raise DataError for ignored keys that no row has. `caches` are all data sets of the run: each may have its own.

    Nothing is said of rows with more keys than a cache keeps.
    """
    ignored = spec.data.ignore_keys
    if not ignored or any(len(cache.unread) >= MOST_UNREAD for cache in caches):
        return
    found = {name.rpartition("[].")[2] for cache in caches for name in cache.unread}
    if spec.evaluation.prompts is not None:
        found |= prompt_keys(Path(spec.evaluation.prompts))
    problems = [
        f"data.ignore_keys: no row has a key {name!r} with a value that nothing reads; take it out, or write it as the "
        f"rows do{did_you_mean(name, found)}"
        for name in ignored
        if name not in found
    ]
    if problems:
        raise DataError(problems)
