"""The usage example of trlx's trainer runs after a change of import, alone and under both ways to start ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.contract.rundir import RunPaths, read_lines
from tests.sft.compat.material import megatron_config, trl_config
from tests.tiers import thinned
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.parity

PROGRAM = """\
from sft.compat import trlx
from sft.compat.trlx import TRLConfig

config = TRLConfig.load_yaml("sft.yaml")
samples = [
    "Human: How many otters are there? Assistant: There are four otters.",
    "Human: How many herons are there? Assistant: There are two herons.",
]
trlx.train(
    samples=samples,
    eval_prompts=["Human: How many otters are there? Assistant:"] * 2,
    metric_fn=lambda samples, **kwargs: {"length": [len(sample) for sample in samples]},
    config=config,
    stop_sequences=["Human:", "Assistant:"],
)
"""
STARTS = {
    "alone": (1, [sys.executable]),
    "local_ranks": (
        2,
        [sys.executable, "-m", "launcher.contract.local_ranks", "--ranks", "2", "--log-dir", "logs", "--"],
    ),
    "torchrun": (2, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
}


@pytest.mark.parametrize("start", thinned(STARTS, "local_ranks"))  # tests.ranks sets what torchrun does
def test_the_example_runs(tmp_path: Path, start: str) -> None:
    ranks, command = STARTS[start]
    make_tiny_model(tmp_path / "model")
    (tmp_path / "megatron.yaml").write_text(yaml.safe_dump(megatron_config(ranks)))
    kwargs = {"megatron_cfg": "megatron.yaml", "pretrained_model": "model"}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(trl_config("model", trainer_kwargs=kwargs)))
    (tmp_path / "main.py").write_text(PROGRAM)
    python = [sys.executable] if start == "local_ranks" else []
    done = subprocess.run([*command, *python, "main.py"], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    paths = RunPaths(tmp_path / "ckpts")
    records = list(read_lines(paths.metrics))
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert len([record for record in records if "metric/length" in record]) == 3
    assert (paths.export / "model.safetensors").is_file()
    assert paths.config.is_file()
    assert [event["event"] for event in read_lines(paths.events)][-2:] == ["exported", "attempt_ended"]
