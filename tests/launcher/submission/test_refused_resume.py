"""What the ranks would refuse to go on from is refused before it waits in a queue, in the same words."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="it makes what ranks would leave")

from launcher.__main__ import main
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import COMPLETE, RunPaths
from launcher.contract.spec import ModelSpec, read_resolved
from launcher.submission import early_resume
from sft.checkpoint.contents import TrainerState, optimizer_form
from sft.data.prepared.data_key import data_key
from sft.data.prepared.prepare import open_or_build
from sft.hf.checks import trained_adapters
from sft.models.numerics import numerics
from sft.models.registry import read_architecture
from tests.launcher.submission.test_early_refusal import WITHOUT_TORCH
from tests.launcher.submission.test_submit import RUN, launch, state, wait_for
from tests.tiny_model import make_chat_rows, make_tokenizer, write_jsonl

LONGER = "train.max_steps=9"


@pytest.fixture
def run(workdir: Path, fake_python: str) -> RunPaths:
    """A run that has ended after its third step, with the checkpoint that its ranks would have left."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained("model")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
    write_jsonl(Path("a.jsonl"), make_chat_rows(12, 1))
    assert launch(fake_python, "data.workers=1", "--follow") == 0
    spec, model = read_resolved(RUN.config), Path("model")
    (cache,) = open_or_build(spec, model, build=True).training_caches
    architecture = read_architecture(model)
    written = TrainerState(
        lightning={},
        topology={},
        data_key=data_key(spec, {"data.train": cache.key}),
        adapters=trained_adapters(spec.model.lora, architecture),
        model=numerics(architecture),
        optimizer=optimizer_form(spec.train),
    )
    RUN.checkpoint(3).mkdir(parents=True)
    (RUN.checkpoint(3) / "trainer.json").write_text(written.to_json())
    (RUN.checkpoint(3) / COMPLETE).touch()
    return RUN


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=7", "was written by a run over other batches: train.seed was 1234, is 7. Going on would repeat"),
        ("data.loss_on=all", "by a run over other batches: data.train was sha256:"),
        ("data.train=b.jsonl", "by a run over other batches: data.train was sha256:"),
        (
            "data.packing=true",
            "by a run over other batches: data.packing was false, is true; data.seq_length was unset",
        ),
        ("model.lora.rank=4", "by a run that trained something else: model.lora.rank was unset, is 4"),
        ("train.optimizer.distributed=false", "that stores the optimizer's states in another form"),
        (
            "train.optimizer.lr_by_name={model.embed_tokens.weight: '0'}",
            "has learning rates of their own for no parameters",
        ),
    ],
)
def test_a_child_that_its_ranks_would_refuse(
    run: RunPaths, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to be queued, and refused when its nodes had come."""
    write_jsonl(Path("b.jsonl"), make_chat_rows(12, 2))
    capsys.readouterr()
    assert main(["resubmit", "first", LONGER, override]) == ExitCode.BAD_INPUT
    assert f"error: {run.checkpoint(3).absolute()} " in (shown := capsys.readouterr().err)
    assert said in shown
    assert [path.name for path in Path("runs").iterdir() if not path.name.startswith(".")] == ["first"]


def test_a_child_that_may_go_on(run: RunPaths) -> None:
    assert main(["resubmit", "first", LONGER, "train.optimizer.lr=1e-5", "data.workers=2"]) == 0
    assert main(["resubmit", "first", "train.seed=7", "name=anew", "checkpoint.resume_from=null", LONGER]) == 0
    for name in ("first-2", "anew"):
        wait_for(lambda name=name: state(RunPaths(Path("runs") / name)).terminal)  # type: ignore[misc]


def test_files_that_were_edited_since(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(Path("a.jsonl"), make_chat_rows(12, 3))
    assert main(["resubmit", "first", LONGER]) == ExitCode.BAD_INPUT
    assert "by a run over other batches: data.train was sha256:" in capsys.readouterr().err


def test_the_same_run_over_files_that_were_edited_since(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in run.events.read_text().splitlines() if '"attempt_ended"' not in line]
    run.events.write_text("\n".join(lines) + "\n")  # as a run that was killed leaves it
    write_jsonl(Path("a.jsonl"), make_chat_rows(12, 3))
    capsys.readouterr()
    assert main(["resubmit", "first"]) == ExitCode.BAD_INPUT
    assert f"{run.checkpoint(3)} was written by a run over other batches: data.train was" in capsys.readouterr().err
    write_jsonl(Path("a.jsonl"), make_chat_rows(12, 1))
    assert main(["resubmit", "first"]) == 0
    wait_for(lambda: state(run).terminal)


def test_an_edited_config_of_the_model(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    assert main(["resubmit", "first", LONGER]) == ExitCode.BAD_INPUT
    said = capsys.readouterr().err
    assert "was written by a run of another model: " in said and "is 500000.0. The same weights would" in said


def test_none_of_it_needs_torch(run: RunPaths) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", WITHOUT_TORCH, "validate", "cfg.yaml", "name=child", "data.workers=1"]
    command += [f"checkpoint.resume_from={run.checkpoint(3)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "data.loss_on=all"], env=environment, capture_output=True, text=True, check=False)
    assert "by a run over other batches: data.train was sha256:" in done.stderr


def test_a_model_that_is_converted_first(run: RunPaths) -> None:
    """It has no config.json yet: what does not depend on it is told all the same."""
    spec = dataclasses.replace(read_resolved(run.config), model=ModelSpec(path="model.gguf"))
    early_resume.check_resume_from(spec, run.checkpoints)
    other = dataclasses.replace(spec, train=dataclasses.replace(spec.train, seed=7))
    with pytest.raises(ConfigError, match=r"over other batches: train\.seed was 1234, is 7"):
        early_resume.check_resume_from(other, run.checkpoints)


def test_a_child_that_has_no_checkpoint_of_its_own_yet(run: RunPaths) -> None:
    assert main(["resubmit", "first", LONGER]) == 0
    child = RunPaths(Path("runs/first-2"))
    wait_for(lambda: state(child).terminal)
    write_jsonl(Path("a.jsonl"), make_chat_rows(12, 3))
    with pytest.raises(ConfigError, match=r"over other batches: data\.train was sha256:"):
        early_resume.check_goes_on(read_resolved(child.config), child)
