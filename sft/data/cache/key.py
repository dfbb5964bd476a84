"""What a token cache is made from, and the name that follows from it.

Without torch, numpy and transformers: on a login node the launcher compares it with what a checkpoint's cache was made
from, which the cache's manifest holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.named_templates import NONE, TOKENIZER, template_bytes
from launcher.contract.rundir import JsonObject, read_json
from launcher.contract.spec import DataSpec
from sft.data.encoding.tokenizer import class_hints, tokenizer_files
from sft.data.reading.files import sha256_of

if TYPE_CHECKING:
    from sft.data.reading.split import Side

CODE_VERSION = 5
"""Increase it with every change that gives the same rows other tokens or weights."""

FORMAT_VERSION = 3
"""2 has checksums and the ends of answers in the manifest; 3 has the keys that nothing reads, and its own digest."""

MANIFEST = "manifest.json"

_POLICIES = ("columns", "chat_template_kwargs", "loss_on", "on_mismatch", "seq_length", "length_policy")
_ONLY_REFUSE = {"ignore_keys": [], "require_end_tokens": True}
"""Settings that decide whether rows are refused, and not what is made of them. Keys have these values for all runs."""

MadeFrom = Mapping[str, object]
"""Everything that decides the bytes of a cache, as JSON has it."""


def code_versions() -> list[object]:
    """Return the versions of what turns rows into tokens."""
    return [CODE_VERSION, FORMAT_VERSION, version("transformers"), version("tokenizers")]


def made_from(
    data: DataSpec,
    content: Sequence[str],
    tokenizer_dir: Path,
    side: Side | None,
    code: Sequence[object],
    *,
    earlier: bool = False,
) -> MadeFrom:
    """Return what a cache is made from, with `earlier` as earlier versions took it. `content` are digests of files."""
    template = template_bytes(data.chat_template)
    made: dict[str, object] = {
        "code": list(code),
        "data": list(content),
        "format": data.format,
        "tokenizer": {str(path.relative_to(tokenizer_dir)): sha256_of(path) for path in tokenizer_files(tokenizer_dir)},
        "template": data.chat_template if template is None else hashlib.sha256(template).hexdigest(),
        "policies": {name: getattr(data, name) for name in _POLICIES}
        | {name: getattr(data, name) if earlier else value for name, value in _ONLY_REFUSE.items()},
    }
    if data.loss_on == "all" and data.format == "prompt_completion":
        made["prompts"] = "trained"  # earlier versions left out those that are lists of messages
    hints = class_hints(tokenizer_dir)
    if hints:
        made["tokenizer_class"] = hints
    dotted = [name for name in ("tools", "labels", "loss_mask") if "." in data.columns.get(name, "")]
    if dotted:
        made["dotted"] = dotted  # earlier versions did not find these in nested values
    if side is not None:
        made["split"] = [data.validation_split, side]
    if _asks_for_the_date(data, tokenizer_dir):
        made["date"] = data.now.date().isoformat()
    return made


def key_of(made: MadeFrom) -> str:
    """Return the key of a cache: the SHA-256 of everything that decides its bytes."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def cache_folder(cache_dir: Path, key: str) -> Path:
    """Return the directory of the cache with this key."""
    return cache_dir / "tokens" / key[:40]


def recorded(folder: Path, key: str) -> MadeFrom | None:
    """Return what the cache of this key was made from, or None where it is gone or an earlier version has made it."""
    made = _manifest(folder).get("made_from")
    return made if isinstance(made, dict) and key_of(made) == key else None


def recorded_sizes(folder: Path) -> list[int]:
    """Return the bytes of each file that a cache was made from, none where an earlier version has made it."""
    sizes = _manifest(folder).get("bytes")
    return sizes if isinstance(sizes, list) else []


def _manifest(folder: Path) -> JsonObject:
    try:
        values = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _asks_for_the_date(data: DataSpec, tokenizer_dir: Path) -> bool:
    """Return whether the chat template may write the date."""
    # Only then does the date belong to the key: else every cache would be built again each day.
    if data.chat_template == NONE:
        return False
    template = template_bytes(data.chat_template)
    templates = [template] if template is not None else []
    if data.chat_template == TOKENIZER:
        templates = [
            path.read_bytes()
            for path in tokenizer_files(tokenizer_dir)
            if path.suffix == ".jinja" or "config" in path.name
        ]
    return any(b"strftime_now" in template for template in templates)
