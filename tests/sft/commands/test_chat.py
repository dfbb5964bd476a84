"""`python -m sft chat`: what is asked and answered, of an exported model, an adapter's run and a checkpoint."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import DataSpec, ModelSpec, RunSpec, to_yaml
from sft.__main__ import main
from sft.hf.stop_tokens import record_stop_tokens
from tests.parity.runs import make_run, run_training
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

Chat = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Type lines and return what is answered."""

    def typed(place: Path, *lines: str, options: tuple[str, ...] = ("--max-new-tokens", "6"), code: int = 0) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(place), *options]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return typed


def by_hand(directory: Path, text: str, count: int = 6, ends: tuple[int, ...] = ()) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = list(start)
    for _ in range(count):
        with torch.no_grad():
            token = int(network(torch.tensor([ids])).logits[0, -1].argmax())
        if token in (tokenizer.eos_token_id, *ends):
            break
        ids.append(token)
    return str(tokenizer.decode(ids[len(start) :], skip_special_tokens=True))


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


ASK = "<|im_start|>assistant\n"


def test_a_conversation_goes_on_and_can_begin_anew(chat: Chat, model: Path) -> None:
    first = by_hand(model, turn("user", "How many otters?") + ASK)
    history = turn("user", "How many otters?") + turn("assistant", first)
    second = by_hand(model, history + turn("user", "And herons?") + ASK)
    anew = by_hand(model, turn("user", "And herons?") + ASK)
    said = chat(model, "How many otters?", "And herons?", "/reset", "And herons?", "/quit", "never asked")
    assert said == f"{first}\n{second}\n{anew}\n"


def test_instructions_are_the_system_turn(chat: Chat, model: Path) -> None:
    expected = by_hand(model, turn("system", "Be red.") + turn("user", "Who?") + ASK)
    assert chat(model, "Who?", options=("--system", "Be red.", "--max-new-tokens", "6")) == f"{expected}\n"
    assert chat(model, "/system Be red.", "Who?") == f"{expected}\n"


def test_sampling_is_that_of_evaluations_and_repeats_itself(chat: Chat, model: Path) -> None:
    options = ("--temperature", "1.5", "--max-new-tokens", "12")
    first = chat(model, "Who?", options=options)
    assert chat(model, "Who?", options=options) == first
    assert chat(model, "Who?", options=(*options, "--seed", "5")) != first


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1"])
def test_a_temperature_by_which_nothing_can_be_divided(
    model: Path, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(model), "--temperature", temperature]) == ExitCode.BAD_INPUT
    assert "--temperature at least 0" in capsys.readouterr().err


def test_of_a_run_its_export_with_its_prompts_and_stop_tokens(
    chat: Chat, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path / "run")
    shutil.copytree(model, paths.export)
    data = DataSpec(train=["x"], chat_template="zephyr")
    paths.config.write_text(to_yaml(RunSpec(name="run", model=ModelSpec(path=str(model)), data=data)))
    whole = by_hand(model, turn("user", "Who?") + ASK)
    assert chat(paths.root, "Who?") == f"{whole}\n"
    monkeypatch.setenv("SFT_RUN_ROOT", str(tmp_path))
    assert chat(Path("run"), "Who?") == f"{whole}\n"  # by its name, as the launcher takes it
    tokenizer = AutoTokenizer.from_pretrained(model)
    stop = tokenizer(whole, add_special_tokens=False)["input_ids"][2]
    record_stop_tokens(paths, [stop])
    assert chat(paths.root, "Who?") == by_hand(model, turn("user", "Who?") + ASK, ends=(stop,)) + "\n"


@pytest.mark.parity
def test_of_a_checkpoint_that_was_not_exported(chat: Chat, model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", make_chat_rows(16, seed=0))
    paths = make_run(tmp_path, model, rows, ranks=1, max_steps=3)
    run_training(paths, 1)
    said = chat(paths.root, "How many otters?").partition("\n")
    assert said[0] == "exporting step-00000003: the newest"
    assert not paths.export.exists()
    assert said[2] != chat(model, "How many otters?")
    from sft.commands.export import export_run

    export_run(paths.root)
    assert paths.export.is_dir()
    assert chat(paths.root, "How many otters?").endswith(f"\n{said[2]}")


def test_a_conversation_too_long_for_the_model_is_refused(
    chat: Chat, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(model, "otter " * 3000) == ""


def test_what_is_no_model_is_refused(chat: Chat, tmp_path: Path, model: Path) -> None:
    assert "is neither a run nor a model" in chat(tmp_path, code=4)
    assert "--step: " in chat(model, options=("--step", "3"), code=4)
    assert "--top-p in (0, 1]" in chat(model, options=("--top-p", "0"), code=2)
