"""A config of a large model, whose topology is to be chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.contract.model_shape import named_model_config


@pytest.fixture
def big(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An 8B model on a cluster of H100s that asks above 10 GPU hours."""
    (workdir / "model" / "config.json").write_text(json.dumps(named_model_config("8b")))
    folder = tmp_path / "home" / "cluster_configs"
    folder.mkdir(parents=True)
    (folder / "big.yaml").write_text(
        "scheduler: slurm\ngpu: h100\ngpu_hour_price: 2\nresources: {gpus_per_node: 8, gpu_hour_limit: 10}\n"
    )
    monkeypatch.setenv("SFT_LAUNCHER_HOME", str(folder.parent))
    config = workdir / "big.yaml"
    config.write_text(
        "name: big\ncluster: big\nmodel: {path: model}\ndata: {train: a.jsonl, seq_length: 4096}\n"
        "train: {max_steps: 1000, global_batch_size: 128}\nresources: {nodes: 2}\ntopology: auto\n"
    )
    return config
