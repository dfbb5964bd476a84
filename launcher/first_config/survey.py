"""What a model and data files say about the settings of their first run. Only heads of files are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.flops import parameters
from launcher.contract.model_shape import ModelShape
from launcher.contract.named_templates import NAMES, named_template, needed_tokens
from launcher.contract.rundir import read_json

_HEAD = 4 << 20
"""Bytes that are read of a file."""
_BYTES_PER_TOKEN = 3
"""Fewer than English text has, so that estimates err on the long side."""
_LENGTHS = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSurvey:
    """What the heads of data files tell."""

    rows: int | None
    """About how many rows there are; None for files that are no lines."""
    longest: int | None
    """Bytes of the longest row in the heads."""
    is_text: bool
    """Whether rows are texts or token ids, for which there is no chat template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """Everything that settings are derived from."""

    shape: ModelShape
    data: DataSurvey
    template: str | None
    """The chat template to name; None: the tokenizer's own, or none is needed."""
    longest_row: int | None = None
    """Tokens beyond which the model's RoPE would depend on the length of the batch; None where it never does."""

    @property
    def billions(self) -> float:
        """Parameters of the model, in billions."""
        return parameters(self.shape) / 1e9

    @property
    def seq_length(self) -> int:
        """A length that most rows fit into, if the model takes it."""
        wanted = 4096 if self.data.longest is None else self.data.longest // _BYTES_PER_TOKEN
        fitting = next((length for length in _LENGTHS if length >= wanted), _LENGTHS[-1])
        return min(fitting, self.longest_row or fitting, self.shape.max_position_embeddings)


def survey_data(files: Sequence[Path]) -> DataSurvey:
    """Read the heads of data files."""
    rows, longest, is_text = 0.0, 0, False
    lines = [file for file in files if file.suffix == ".jsonl" and file.is_file()]
    for file in lines:
        with file.open("rb") as stream:
            head = stream.read(_HEAD)
        size = file.stat().st_size
        whole = head if size <= len(head) else head[: head.rfind(b"\n") + 1]
        found = [line for line in whole.split(b"\n") if line.strip()]
        rows += len(found) * (size / max(1, len(whole)))
        longest = max([longest, *map(len, found)])
        is_text = is_text or bool(found and _keys(found[0]) & {"text", "input_ids"})
    complete = lines and len(lines) == len(files)
    return DataSurvey(rows=round(rows) if complete else None, longest=longest or None, is_text=is_text)


def template_for(model: Path, data: DataSurvey) -> str | None:
    """Return the name of a chat template that fits the tokenizer, or None where it has one, or none is needed."""
    settings = read_json(model / "tokenizer_config.json") if model.is_dir() else None
    if data.is_text or not isinstance(settings, dict):
        return None
    if settings.get("chat_template") or any(model.glob("chat_template*")):
        return None
    added = [settings.get("added_tokens_decoder"), (read_json(model / "tokenizer.json") or {}).get("added_tokens")]
    known = json.dumps(added, ensure_ascii=False)
    for name in NAMES:
        tokens = needed_tokens(named_template(name))
        if tokens and all(f'"{token}"' in known for token in tokens):
            return name
    return "zephyr"


def _keys(line: bytes) -> set[str]:
    try:
        row = json.loads(line)
    except ValueError:
        return set()  # the checks of the config say it with line and column
    return set(row) if isinstance(row, dict) else set()
