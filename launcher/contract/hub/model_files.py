"""Which files of a model repository are fetched: settings, tokenizer and safetensors.

Never fetched: pickled weights and Python files, both of which run code of the repository when they are loaded.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

from launcher.contract.errors import HubError
from launcher.contract.hub.client import fetch
from launcher.contract.hub.listing import Listing

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SETTINGS = ("*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", "LICENSE*")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def settings_files(listing: Listing) -> list[str]:
    """Return the small files of a repository: settings, tokenizer, chat templates."""
    top = [name for name in listing.sizes if "/" not in name and any(fnmatch(name, form) for form in _SETTINGS)]
    return top + [name for name in listing.sizes if fnmatch(name, "additional_chat_templates/*.jinja")]


def weight_files(listing: Listing) -> list[str]:
    """Return the safetensors files of a model. Where there are several, their index is fetched for that.

    Raise HubError for a repository that has none.
    """
    if _INDEX in listing.sizes:
        if listing.missing([_INDEX]):
            fetch(listing.snapshot, [_INDEX], quiet=True)
        shards = _shards(listing.snapshot.path / _INDEX)
        unknown = [name for name in shards if name not in listing.sizes and listing.is_whole]
        if unknown:
            raise HubError(f"{listing.snapshot}: {_INDEX} names {unknown[0]}, which the repository does not have")
        return shards
    if _SINGLE in listing.sizes:
        return [_SINGLE]
    pickled = [name for name in listing.sizes if any(fnmatch(name, form) for form in _PICKLED)]
    if pickled:
        raise HubError(
            f"{listing.snapshot.repository.id} has no {_SINGLE}, only {pickled[0]}: pickled weights run code when they "
            "are loaded. Convert it, or name a revision that has safetensors (the hub's converter offers one as "
            "refs/pr/N)"
        )
    raise HubError(f"{listing.snapshot.repository.id} has neither {_SINGLE} nor {_INDEX}; is it a model's repository?")


def has_weights(folder: Path) -> bool:
    """Return whether a folder has all safetensors files of a model."""
    index = folder / _INDEX
    names = _shards(index) if index.is_file() else [_SINGLE]
    return all((folder / name).is_file() for name in names)


def _shards(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(name) for name in weight_map.values()})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise HubError(f"{index} is not an index of safetensors files") from None
    bad = [name for name in shards if not name.endswith(".safetensors") or "/" in name]
    if bad:
        raise HubError(f"{index} names {bad[0]!r}, which is not a safetensors file beside it")
    return shards
