"""Whether a text that stands in place of a path is meant as a hub id."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.hub.found import Found
from launcher.contract.hub_cache import is_id


def is_meant(key: str, text: str, found: Found, *, named: bool, may_come_later: bool = False) -> bool:
    """Return whether the value of `key` is to be looked for on the hub, with a remark or a problem where it is not.

    `named` says that the user has given a revision, config or split of it as well.
    """
    if not is_id(text):
        return False
    if Path(text).exists():
        found.notes.append(f"{key}: {text} is taken from this directory, not from the hub")
        return False
    organization = text.partition("/")[0]
    if not named and Path(organization).is_dir():
        if not may_come_later:
            found.problem(
                key,
                f"{text} does not exist; the hub was not asked, as {organization}/ is a folder here (a revision, such "
                "as main, beside it asks all the same)",
            )
        return False
    return True
