"""Fixtures: a folder with a config, a tiny model's config.json and data, and programs that stand in for Slurm's."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
}

CONFIG = """\
name: first
model: {path: model}
data: {train: "*.jsonl", seq_length: 128}
train: {max_steps: 3, global_batch_size: 4}
resources: {tasks_per_node: 2, time: 1:30:00}
topology: {pipeline_parallel: 2}
"""


def write_workdir(folder: Path) -> None:
    """Write model/, a.jsonl and cfg.yaml."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    (folder / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "cfg.yaml").write_text(CONFIG)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of the test, with model/, a.jsonl and cfg.yaml."""
    folder = tmp_path / "work"
    write_workdir(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SFT_RUN_ROOT", raising=False)
    monkeypatch.delenv("SFT_LAUNCHER_HOME", raising=False)
    return folder


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """An empty folder in front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Commands(folder)


class Commands:
    """Makes commands that stand in for real ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, body: str) -> Path:
        """Add a bash script of this name, which logs its arguments to NAME.calls."""
        path = self.folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{self.folder}/{name}.calls\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def calls(self, name: str) -> list[str]:
        """Return the arguments of every call so far, one line each."""
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


FAKE_PYTHON = """\
[ "$2" != launcher.attempts.attempt ] || exit 0 # nothing to say about restarts
phase=$3 # -m sft PHASE
echo "$phase ${RANK-}"
if [ "$phase" = train ]; then
  trap 'echo "asked to stop"; exit 75' TERM USR2
  for ((tick = 0; tick < ${FAKE_TICKS:-1}; tick++)); do sleep 0.05; done
  [ "${RANK-}" != "${FAKE_BAD_RANK-none}" ] || exit "$FAKE_CODE"
fi
"""


@pytest.fixture
def fake_python(commands: Commands) -> str:
    """Override that has a bash script stand in for the ranks' Python; FAKE_TICKS lengthens training."""
    return f"cluster.runtime.python={commands.add('rank-python', FAKE_PYTHON)}"
