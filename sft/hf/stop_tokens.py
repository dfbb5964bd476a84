"""The tokens that end an answer of an exported model: those that the run trained, beside those of its source.

A model that was trained to end its turns with `<|im_end|>` and whose generation_config.json knows only `<|endoftext|>`
never stops. `prepare` writes down which tokens end answers in the training data; the export names them in
generation_config.json, which transformers and serving engines read.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from launcher.contract.errors import CheckpointError
from launcher.contract.rundir import RunPaths, read_json, write_json

_FILE = "generation_config.json"
_KEY = "eos_token_id"


def record_stop_tokens(paths: RunPaths, trained: Collection[int]) -> None:
    """Write down, in the run directory, which tokens end answers in the training data."""
    write_json(paths.stop_tokens, {"trained": sorted(trained)})


def recorded_stop_tokens(paths: RunPaths) -> list[int]:
    """Return the tokens that end answers in the training data, none for a run of a version that did not record them."""
    record = read_json(paths.stop_tokens)
    if record is None:
        return []
    trained = record.get("trained") if isinstance(record, dict) else None
    if not isinstance(trained, list) or not all(type(token) is int for token in trained):
        raise CheckpointError(f"{paths.stop_tokens} is damaged: it must hold a list of token ids under 'trained'")
    return trained


def add_stop_tokens(directory: Path, trained: Collection[int]) -> None:
    """Add `trained` to the end tokens in `directory`/generation_config.json, behind those that are there.

    A directory without that file gets one that also has the end tokens of its config.json, which it replaces as what
    `generate` reads.
    """
    settings = read_json(directory / _FILE)
    source = settings if settings is not None else read_json(directory / "config.json") or {}
    known = source.get(_KEY)
    ends = list(known) if isinstance(known, list) else [known] if isinstance(known, int) else []
    missing = [token for token in sorted(trained) if token not in ends]
    if missing:
        write_json(directory / _FILE, {**(settings or {}), _KEY: [*ends, *missing]})
