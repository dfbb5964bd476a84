"""`launcher init`: what it writes is what `submit` takes, and every value follows from what it looked at."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.__main__ import main
from launcher.contract.named_templates import NAMES
from launcher.first_config.answers import Answers
from launcher.first_config.survey import survey_data, template_for
from tests.launcher.conftest import MODEL

SLURM = """\
scheduler: slurm
gpu: h100
resources: {gpus_per_node: 8, time: "1:00:00"}
"""


@pytest.fixture
def work(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with model/, big/ (an 8B model's shape), rows.jsonl, and a cluster `site` of H100s."""
    (workdir / "cfg.yaml").unlink()
    shape = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    big = {**MODEL, **shape, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    (workdir / "big").mkdir()
    (workdir / "big" / "config.json").write_text(json.dumps(big))
    row = json.dumps({"prompt": "a" * 1500, "completion": "b"})
    (workdir / "rows.jsonl").write_text(f"{row}\n" * 600)
    home = tmp_path / "home"
    (home / "cluster_configs").mkdir(parents=True)
    (home / "cluster_configs" / "site.yaml").write_text(SLURM)
    monkeypatch.setenv("SFT_LAUNCHER_HOME", str(home))
    return workdir


def written() -> dict[str, dict[str, object]]:
    values: dict[str, dict[str, object]] = yaml.safe_load(Path("cfg.yaml").read_text())
    return values


def test_cpu_ranks_of_this_machine(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--model", "model", "--data", "rows.jsonl", "--cluster", "local", "--gpus", "0"]) == 0
    assert "launcher submit cfg.yaml" in capsys.readouterr().out
    values = written()
    assert values["name"] == "model-rows"
    assert values["train"]["optimizer"] == {"lr": 2e-5, "min_lr": 2e-6, "warmup_ratio": 0.03}
    assert (values["train"]["global_batch_size"], values["train"]["epochs"]) == (16, 3)
    assert "# about 114 steps\n" in Path("cfg.yaml").read_text()  # 3 epochs of 600 / 16, the last of each short
    assert values["data"]["seq_length"] == 512  # 1,529 bytes / 3
    assert values["train"]["precision"] == "fp32"
    assert main(["submit", "cfg.yaml", "--dry-run"]) == 0


def test_a_layout_of_the_planner_for_gpus(work: Path) -> None:
    assert main(["init", "--model", "big", "--data", "rows.jsonl", "--cluster", "site", "--gpus", "16"]) == 0
    values = written()
    assert values["resources"] == {"nodes": 2, "gpus_per_node": 8}
    assert set(values["topology"]) >= {"tensor_parallel", "pipeline_parallel"}
    assert values["train"]["optimizer"] == {"lr": 1e-5, "min_lr": 1e-6, "warmup_ratio": 0.03}
    assert "planned:" in Path("cfg.yaml").read_text()
    assert main(["submit", "cfg.yaml", "--dry-run"]) == 0


def test_adapters_have_a_higher_rate_and_fit_on_one_gpu(work: Path) -> None:
    words = ["init", "--model", "big", "--data", "rows.jsonl", "--cluster", "site", "--gpus", "1", "--lora"]
    assert main(words) == 0
    values = written()
    assert values["model"]["lora"] == {"rank": 16, "alpha": 32}
    assert values["train"]["optimizer"]["lr"] == 2e-4  # type: ignore[index]
    assert main(["submit", "cfg.yaml", "--dry-run"]) == 0


def test_what_is_wrong_is_said_and_nothing_is_written(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["init", "--model", "big", "--data", "rows.jsonl", "--cluster", "site"]
    assert main([*words, "--gpus", "1"]) == 2
    assert "topology: auto: " in capsys.readouterr().err
    assert main([*words, "--gpus", "12"]) == 2
    assert "12 are not whole nodes of 8 (cluster site): 8, 16" in capsys.readouterr().err
    assert main(["init", "--model", "absent", "--data", "rows.jsonl", "--cluster", "local"]) == 2
    error = capsys.readouterr().err
    assert "error: model.path: " in error
    assert "/absent does not exist" in error
    assert main(["init", "--model", "model"]) == 2
    assert "--data is missing: data files" in capsys.readouterr().err
    assert not Path("cfg.yaml").exists()
    Path("cfg.yaml").write_text("mine")
    assert main(["init", "--model", "model", "--data", "rows.jsonl", "--cluster", "local"]) == 4
    assert Path("cfg.yaml").read_text() == "mine"


def test_it_asks_on_a_terminal(work: Path) -> None:
    there, here = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-m", "launcher", "init", "--output", "own.yaml"]
    os.write(there, b"model\nrows.jsonl\nlocal\n\nlora\n")
    done = subprocess.run(command, stdin=here, capture_output=True, env=environment, timeout=60, check=False)
    os.close(there)
    os.close(here)
    assert done.returncode == 0, done.stderr
    assert b"GPUs in all; 0 trains on CPU ranks [0]: " in done.stderr
    assert "rank: 16" in Path("own.yaml").read_text()


def test_experts_have_the_adapters_that_they_take(work: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    experts |= {"model_type": "qwen3_moe", "head_dim": 16}
    (work / "model" / "config.json").write_text(json.dumps({**MODEL, **experts}))
    words = ["init", "--model", "model", "--data", "rows.jsonl", "--cluster", "local", "--gpus", "0", "--lora", "4"]
    assert main(words) == 0
    assert written()["model"]["lora"]["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]  # type: ignore[index]


def test_a_model_without_a_chat_template_gets_one_that_fits(work: Path) -> None:
    model = work / "model"
    rows = survey_data([work / "rows.jsonl"])
    (model / "tokenizer_config.json").write_text("{}")
    assert template_for(model, rows) == "zephyr"
    added = [{"content": "<|im_start|>"}, {"content": "<|im_end|>"}]
    (model / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert template_for(model, rows) == "chatml"
    assert template_for(model, rows) in NAMES
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert template_for(model, rows) is None


@pytest.mark.parametrize(("kind", "longest"), [("longrope", 1024), ("dynamic", 2048)])
def test_rows_are_no_longer_than_the_models_rope_has_one_meaning(work: Path, kind: str, longest: int) -> None:
    """As in Phi-4-mini, whose 131,072 positions are rotated otherwise beyond the first 4,096."""
    rope = {"longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, "dynamic": {"factor": 4.0}}[kind]
    config = {
        **MODEL,
        "model_type": "phi3" if kind == "longrope" else "llama",
        "original_max_position_embeddings": 1024,
        "max_position_embeddings": 8192 if kind == "longrope" else 2048,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": kind, **rope},
    }
    (work / "model" / "config.json").write_text(json.dumps(config))
    (work / "rows.jsonl").write_text(json.dumps({"prompt": "a" * 9000, "completion": "b"}) + "\n")
    assert main(["init", "--model", "model", "--data", "rows.jsonl", "--cluster", "local", "--gpus", "0"]) == 0
    assert written()["data"]["seq_length"] == longest
    assert "beyond this length the model's RoPE depends on the batch" in Path("cfg.yaml").read_text()
    assert main(["submit", "cfg.yaml", "--dry-run"]) == 0


def test_rows_are_counted_from_heads(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "0123456789"}\n' * 500_000)
    survey = survey_data([file])
    assert survey.rows is not None
    assert abs(survey.rows - 500_000) < 50
    assert (survey.longest, survey.is_text) == (22, True)
    assert survey_data([file, tmp_path / "x.parquet"]).rows is None


def test_names_of_runs() -> None:
    base = {"cluster": "local", "gpus": 0}
    assert Answers(model="package:m/Smol-Q4.gguf", data=("my.jsonl",), **base).run_name == "smol-q4-my"  # type: ignore[arg-type]
    assert Answers(model="Qwen/Qwen3-0.6B", data=("org/set:train",), **base).run_name == "qwen3-0.6b-set"  # type: ignore[arg-type]
    assert Answers(model="/m/A b", data=("x/*.jsonl",), **base, lora_rank=8).run_name == "a-b-lora"  # type: ignore[arg-type]
