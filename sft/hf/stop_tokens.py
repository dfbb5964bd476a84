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


def add_stop_tokens(directory: Path, source: Path, trained: Collection[int]) -> None:
    """Let `directory`/generation_config.json name the end tokens of the model in `source`, and `trained` behind them.

    A directory without that file gets one where there is something to add. It replaces what `generate` would read: the
    config.json beside it, or of an adapter that of the model that it belongs to.
    """
    ends = end_tokens(source)
    missing = [token for token in sorted(trained) if token not in ends]
    if missing:
        write_json(directory / _FILE, {**(read_json(directory / _FILE) or {}), _KEY: [*ends, *missing]})


def end_tokens(directory: Path) -> list[int]:
    """Return the tokens with which transformers ends answers of the model in `directory`.

    They are those of generation_config.json, also where it states none; without that file those of config.json, or of
    the language model in it.
    """
    settings = read_json(directory / _FILE)
    if settings is None:
        config = read_json(directory / "config.json") or {}
        settings = config if config.get(_KEY) is not None else config.get("text_config") or {}
    known = settings.get(_KEY)
    return list(known) if isinstance(known, list) else [known] if isinstance(known, int) else []
